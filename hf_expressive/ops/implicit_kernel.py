"""Implicit kernel attention as a tensor function: features, magnitudes, then the family's evaluation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .functional import Implementation, attend
from .problem import KeyRanges
from .response import Response
from .spectral import spectral_features, squared_norm
from .triton import features as fused
from .triton import magnitude as fused_norm


def implicit_kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    frequencies: Tensor | None = None,
    p: float | Tensor = 2.0,
    epsilon: float = 1e-5,
    scale: float | None = None,
    is_causal: bool = False,
    attention_mask: Tensor | KeyRanges | None = None,
    bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    impl: Implementation = "auto",
) -> Tensor:
    """Implicit kernel attention: a kernel of a spectral density times L^p magnitudes of the keys.

        k_ij = φ(q_i)·φ(k_j)
        w_ij = (k_ij² + ε) · exp(‖k_j‖_p²·scale/2 + bias_ij) · visible_ij
        out_i = Σ_j w_ij v_j / (exp(sink) + Σ_j w_ij)

    The magnitude of the query is common to its row and cancels. Without `frequencies` the kernel is
    the RBF one, exp(−‖q − k‖²·scale/2), neither squared nor with ε: with p = 2 that is softmax
    attention exp(scale·q·k), with another p softmax attention with a bias a key.

    The paper's √d is 1/scale here. Where the two differ, queries and keys are first multiplied by
    (scale·√d)^½, so that frequencies mean the same in every architecture.

    Args:
        query: (batch, heads, query, dim).
        key: (batch, key/value heads, keys, dim); heads is a multiple of key/value heads.
        value: (batch, key/value heads, keys, value dim).
        frequencies: samples of the spectral density in cycles, (key/value heads, S, dim, M) or with a
            batch dimension in front; S = 1 stationary, S = 2 non-stationary. `None`: RBF kernel.
        p: exponent ≥ 1 of the magnitudes, or one a key/value head, (key/value heads,).
        epsilon: ε ≥ 0 of the squared kernel.
        scale: a positive number, or `None` for dim^-½.
        softcap: see `expressive_attention`; for the RBF kernel only.
        is_causal, attention_mask, bias, sliding_window, sinks, dropout, impl: see
            `expressive_attention`.

    Returns:
        (batch, heads, query, value dim) in the dtype of `query`. Features and magnitudes are computed
        in float32, or float64 for float64 inputs; features enter the product in the input's dtype.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.
        NotImplementedError: `impl` names an implementation that does not cover the call.

    Source: K. Song, Y. Jung, D. Kim, I.-C. Moon, "Implicit kernel attention", AAAI 2021,
    arXiv 2006.06147.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            "query and key must have four dimensions (batch, heads, length, dim), got shapes "
            f"{tuple(query.shape)} and {tuple(key.shape)}."
        )
    dim, kv_heads = query.shape[-1], key.shape[1]
    scale = dim**-0.5 if scale is None else float(scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale!r}.")
    if isinstance(p, Tensor):
        if p.shape != (kv_heads,):
            raise ValueError(
                f"p must be a number or a tensor (key/value heads,) = ({kv_heads},), got "
                f"{tuple(p.shape)}."
            )
    elif not (math.isfinite(p) and p >= 1):
        raise ValueError(f"p must be a number ≥ 1, got {p!r}.")
    check_frequencies(frequencies, key)
    if softcap is not None and frequencies is not None:
        raise ValueError(
            f"softcap={softcap} caps a logit, and a spectral kernel has none (it lies between −1 and "
            "1); leave it out, or leave frequencies out for the RBF kernel."
        )
    key_bias: Tensor | None
    if frequencies is None:
        response = Response("exp")
        key_bias = None
        if isinstance(p, Tensor) or p != 2.0:
            key_bias = log_magnitude(key, p, scale) - log_magnitude(key, 2.0, scale)
    else:
        response = Response("square", epsilon=float(epsilon))
        key_bias = log_magnitude(key, p, scale)
        query = kernel_features(query, frequencies, scale)
        key = kernel_features(key, frequencies, scale)
        scale = 1.0
    return attend(
        query,
        key,
        value,
        response=response,
        scale=scale,
        key_bias=key_bias,
        is_causal=is_causal,
        attention_mask=attention_mask,
        bias=bias,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
        impl=impl,
    )


def kernel_features(x: Tensor, frequencies: Tensor, scale: float) -> Tensor:
    """Spectral features of queries or keys, (batch, heads, positions, 2M), in the dtype of `x`.

    Heads are a multiple of the frequencies' heads: a group of query heads shares its frequencies.
    Half-precision tensors on a GPU take kernels that fuse the projection with what follows it
    (`ops.triton.features`); in float32 torch's own product is the faster one.
    """
    half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    if half and fused.unsupported(x, frequencies) is None:
        return fused.fused_features(x, frequencies, unit_length(x, scale))
    # Phases are angles: in the half precision of autocast they would lose their meaning.
    with torch.autocast(x.device.type, enabled=False):
        lengths = in_unit_lengths(x, scale).unflatten(1, (frequencies.shape[-4], -1))
        features = spectral_features(lengths.flatten(2, 3), frequencies.to(lengths.dtype))
        return features.unflatten(2, lengths.shape[2:4]).flatten(1, 2).to(x.dtype)


def log_magnitude(key: Tensor, p: float | Tensor, scale: float) -> Tensor:
    """‖k_j‖_p²·scale/2 in compute dtype, (batch, key/value heads, keys); on a GPU by one kernel."""
    if key.is_cuda and fused_norm.unsupported(key) is None:
        return fused_norm.fused_magnitude(key, p, 0.5 * scale)
    with torch.autocast(key.device.type, enabled=False):
        exponent = p.to(_compute_dtype(key)) if isinstance(p, Tensor) else p
        return squared_norm(key.to(_compute_dtype(key)), exponent) * (0.5 * scale)


def in_unit_lengths(x: Tensor, scale: float) -> Tensor:
    """x · (scale·√d)^½ in compute dtype: lengths that a module with scaling d^-½ would have."""
    return x.to(_compute_dtype(x)) * unit_length(x, scale)


def unit_length(x: Tensor, scale: float) -> float:
    """(scale·√d)^½."""
    return math.sqrt(scale * math.sqrt(x.shape[-1]))


def check_frequencies(frequencies: Tensor | None, key: Tensor) -> None:
    """Raises ValueError if frequencies do not fit the keys."""
    if frequencies is None:
        return
    batch, kv_heads, _, dim = key.shape
    shape = frequencies.shape
    fits = len(shape) in (4, 5) and shape[-4] == kv_heads and shape[-2] == dim
    if not fits or shape[-3] not in (1, 2) or (len(shape) == 5 and shape[0] not in (1, batch)):
        raise ValueError(
            f"frequencies must be (key/value heads, 1 or 2, dim, M) = ({kv_heads}, 1 or 2, {dim}, M), "
            f"or that with the batch ({batch}) in front; got {tuple(shape)}."
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
