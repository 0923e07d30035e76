"""Spectral features, L^p magnitudes, and the dense specification of implicit kernel attention.

Letters: B batch, K key/value heads, N positions, D head size, S densities (1 stationary, 2 direct),
M frequencies a density.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spectral_features(x: Tensor, frequencies: Tensor) -> Tensor:
    """Random Fourier features of a spectral density given by samples of it.

        φ(x) = [Σ_s cos 2πW_s x ; Σ_s sin 2πW_s x] / (S √M)

    With S = 1, φ(x)·φ(y) is Bochner's stationary kernel; with S = 2, Yaglom's non-stationary one.

    Args:
        x: (batch, key/value heads, positions, dim).
        frequencies: W, (key/value heads, S, dim, M), or with a batch dimension in front; cycles per
            unit of x.

    Returns:
        (batch, key/value heads, positions, 2M); the norm of each row is at most 1.
    """
    densities, num_features = frequencies.shape[-3], frequencies.shape[-1]
    # One product for all densities: (…, dim, S · M).
    side_by_side = frequencies.transpose(-3, -2).flatten(-2)
    angle = torch.matmul(x, 2.0 * math.pi * side_by_side).unflatten(-1, (densities, num_features))
    parts = [angle.cos().sum(dim=-2), angle.sin().sum(dim=-2)]
    return torch.cat(parts, dim=-1) / (densities * math.sqrt(num_features))


def squared_norm(x: Tensor, p: float | Tensor) -> Tensor:
    """‖x‖_p², the square of the L^p norm over the last dimension; 0 with zero gradient at x = 0.

    Args:
        x: (batch, heads, positions, dim).
        p: exponent ≥ 1, or one a head, (heads,).

    Returns:
        (batch, heads, positions).
    """
    if not isinstance(p, Tensor) and p == 2.0:
        return x.square().sum(dim=-1)
    # Divided by its largest entry, no power of x over- or underflows. The norm is homogeneous, so the
    # divisor is a constant for the gradient.
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)
    exponent = p[:, None] if isinstance(p, Tensor) else p
    power = p[:, None, None] if isinstance(p, Tensor) else p
    total = (x / largest).abs().pow(power).sum(dim=-1)
    zero = total == 0
    root = torch.where(zero, 1.0, total).pow(2.0 / exponent)
    return torch.where(zero, 0.0, root * largest.squeeze(-1).square())


def spectral_kernel(x: Tensor, y: Tensor, frequencies: Tensor) -> Tensor:
    """The kernel by its definition, without features: the specification of `spectral_features`.

        k(x, y) = 1/(S²M) Σ_m Σ_st cos 2π(w_sm·x − w_tm·y)

    Args:
        x: (batch, key/value heads, queries, dim). y: (batch, key/value heads, keys, dim).
        frequencies: (key/value heads, S, dim, M), or with a batch dimension in front.

    Returns:
        (batch, key/value heads, queries, keys), between −1 and 1.
    """
    densities, num_features = frequencies.shape[-3], frequencies.shape[-1]
    angle_x = 2.0 * math.pi * torch.matmul(x.unsqueeze(2), frequencies)
    angle_y = 2.0 * math.pi * torch.matmul(y.unsqueeze(2), frequencies)
    difference = angle_x[:, :, :, None, :, None] - angle_y[:, :, None, :, None, :]
    return difference.cos().sum(dim=(2, 3, 6)) / (densities**2 * num_features)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    frequencies: Tensor | None,
    p: float | Tensor = 2.0,
    epsilon: float = 1e-5,
    scale: float | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Implicit kernel attention written down as in the paper: dense, in float64, softmax and all.

        energy_ij = log(k(q_i, k_j)² + ε) + ‖q_i‖_p²·scale/2 + ‖k_j‖_p²·scale/2

    Args:
        query: (batch, heads, queries, dim).
        key: (batch, key/value heads, keys, dim). value: (batch, key/value heads, keys, value dim).
        frequencies: see `spectral_features`; `None` is the RBF kernel exp(−‖q − k‖²·scale/2), neither
            squared nor regularised by ε.
        p, epsilon, scale: see `implicit_kernel_attention`.
        visible: bool, broadcastable to (batch, heads, queries, keys), or `None`: everything.

    Returns:
        Output (batch, heads, queries, value dim) and weights (batch, heads, queries, keys), float64.
    """
    dim, group = query.shape[-1], query.shape[1] // key.shape[1]
    scale = dim**-0.5 if scale is None else scale
    query = query.double() * math.sqrt(scale * math.sqrt(dim))
    key = key.double().repeat_interleave(group, dim=1) * math.sqrt(scale * math.sqrt(dim))
    value = value.double().repeat_interleave(group, dim=1)
    if isinstance(p, Tensor):
        p = p.double().repeat_interleave(group)
    if frequencies is None:
        distance = (query[:, :, :, None] - key[:, :, None]).square().sum(dim=-1)
        similarity = -distance / (2.0 * math.sqrt(dim))
    else:
        frequencies = frequencies.double().repeat_interleave(group, dim=-4)
        similarity = torch.log(spectral_kernel(query, key, frequencies).square() + epsilon)
    norms = squared_norm(query, p)[..., :, None] + squared_norm(key, p)[..., None, :]
    energy = similarity + norms / (2.0 * math.sqrt(dim))
    if visible is not None:
        energy = energy.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(energy, dim=-1)
    # A row that sees nothing is 0 / 0 in the softmax and 0 by contract.
    weights = torch.where((energy == -torch.inf).all(dim=-1, keepdim=True), 0.0, weights)
    return weights @ value, weights
