"""Learned spectral densities: modules that yield the frequencies of implicit kernel attention.

Each yields W, (key/value heads, S, dim, M) in cycles, or with the batch in front where it depends on
the input, and the regulariser that belongs to it. Parameters are used in float32 or wider, whatever
the dtype of the model.

Letters: K key/value heads, d head size, S densities (1 stationary, 2 direct), M frequencies a density.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..config import ImplicitKernelConfig


class LearnedFrequencies(nn.Module):
    """Frequencies that are parameters: `weight`, (K, S, d, M).

    They start, as `init` says, uniformly within ±d^-½ (kaiming with a = √5, its fan-in d), or with
    2πW ~ N(0, 1/(2√d)). The score is the square of the kernel, so the Gaussian approximates the root
    of the RBF kernel, exp(−‖q − k‖²/(4√d)), with an error that falls as M^-½. `"orthogonal"` has the
    same Gaussian in each frequency, but makes those of a block of d orthogonal to each other, which
    cancels a part of the error (F. X. Yu et al., "Orthogonal random features", NeurIPS 2016).

    How close that is: the mean share of a row's weight on other keys than softmax puts it on, for 128
    standard normal queries and keys times a length, ten draws (`recipes/closeness.py`, whose
    results tell the spread):

        d   length   init         M = 64    256    1024    4096   rate
        16   0.5     gaussian      0.062   0.030   0.015   0.008   M^-0.51
        16   0.5     orthogonal    0.023   0.011   0.006   0.003   M^-0.50
        16   1       gaussian      0.312   0.171   0.091   0.046   M^-0.46
        16   1       orthogonal    0.267   0.140   0.071   0.036   M^-0.48
        64   0.5     gaussian      0.144   0.073   0.037   0.018   M^-0.50
        64   0.5     orthogonal    0.082   0.041   0.020   0.010   M^-0.50
        64   1       gaussian      0.601   0.561   0.453   0.303   M^-0.16
        64   1       orthogonal    0.607   0.559   0.449   0.300   M^-0.17

    Those are the figures of `"stationary"`; `"direct"` differs by at most 0.003. Long queries and keys
    in large heads are beyond any affordable M: their kernel values lie below the sampling error. To
    convert such a model without a loss, start from `kernel="rbf"`.

    The two densities of `"direct"` start a tenth of a standard deviation apart: equal ones would receive
    equal gradients for ever.
    """

    def __init__(self, options: ImplicitKernelConfig, heads: int, dim: int) -> None:
        super().__init__()
        self.init = options.init
        densities = 2 if options.kernel == "direct" else 1
        self.weight = nn.Parameter(torch.empty(heads, densities, dim, options.num_features))

    def forward(self, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.weight, self.weight.new_zeros(())

    def reset_parameters(self) -> None:
        heads, densities, dim, num_features = self.weight.shape
        if self.init == "kaiming":
            init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)
            return
        deviation = (2.0 * math.sqrt(dim)) ** -0.5 / (2.0 * math.pi)
        shared = self.weight.new_empty(heads, 1, dim, num_features).normal_()
        if self.init == "orthogonal":
            shared = _orthogonalized(shared)
        apart = torch.zeros_like(self.weight).normal_(std=0.1 if densities == 2 else 0.0)
        init.copy_(self.weight, (shared + apart) * deviation)


def _orthogonalized(columns: Tensor) -> Tensor:
    """Keeps the lengths of random columns (…, d, M), makes the directions of each d orthogonal."""
    blocks = []
    for block in columns.float().split(columns.shape[-2], dim=-1):
        directions = torch.linalg.qr(block).Q
        blocks.append(directions * block.norm(dim=-2, keepdim=True))
    return torch.cat(blocks, dim=-1).to(columns.dtype)


class GeneratedFrequencies(nn.Module):
    """Frequencies of an implicit density: noise around ±μ through two odd networks.

        z = ±μ + σ X,   W_s = sign(z) · MLP_s(|z|),   s = 1, 2

    Both networks read the same z, so the two densities are coupled sample by sample, as Yaglom's joint
    density couples them. Half of the M samples have the sign +, half −. X is standard normal; with
    `"copula"` that of the heads is coupled, X ← D L X, L unit lower triangular (K, K), D the diagonal
    matrix that returns each head to unit variance. So X has the Gaussian copula with correlations
    D L Lᵀ D, and since the margins F are Gaussian too, F⁻¹(Φ(X)) is ±μ + σ X: neither Φ nor F⁻¹ has to
    be computed. (D is what makes Φ(X) uniform, hence a copula.)

    μ, log σ² and L are learned constants; with `conditional` a network of the mean query and key adds
    to them. In training X is drawn from the default generator, which checkpointing restores for its
    second forward pass; in evaluation it is the stored `sample`.

    The regulariser is

        kl_weight · Σ KL(N(μ, σ²) ‖ N(0, prior_scale²)) + copula_weight · d · ½ Σ_h log (L Lᵀ)_hh

    summed over heads and dimensions and averaged over the batch. The second term is the mutual
    information of the coupled heads, minus the entropy of their copula density: what the KL of the
    joint noise has beyond the sum over its margins. It is 0 for uncoupled heads.

    Parameters: `mean`, `log_variance` (K, d); `coupling` (K(K − 1)/2,), the rows of L below the
    diagonal; the networks. Buffer: `sample` (K, M, d).
    """

    def __init__(
        self, options: ImplicitKernelConfig, heads: int, dim: int, *, conditional: bool, layer: int
    ) -> None:
        super().__init__()
        self.options = options
        # Layers differ in their stored noise, and the same layer has the same one in every process.
        self.seed = (options.seed + layer) % 2**63
        self.mean = nn.Parameter(torch.empty(heads, dim))
        self.log_variance = nn.Parameter(torch.empty(heads, dim))
        self.generators = nn.ModuleList(_Network(dim, dim, dim, dim) for _ in range(2))
        self.condition_noise = _Network(2 * dim, dim, 2 * dim) if conditional else None
        self.coupled = options.kernel == "copula"
        self.condition_coupling: _Network | None = None
        if self.coupled:
            entries = heads * (heads - 1) // 2
            self.coupling = nn.Parameter(torch.empty(entries))
            if conditional:
                self.condition_coupling = _Network(2 * dim, dim, entries)
        self.register_buffer("sample", torch.empty(heads, options.num_features, dim))
        self.sample: Tensor

    def forward(self, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """(W, regulariser).

        Args:
            condition: mean query and mean key of each head, (batch, K, 2d), or `None`.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        if condition is not None:
            dtype = torch.promote_types(dtype, condition.dtype)
        mean, log_variance = self.mean.to(dtype), self.log_variance.to(dtype)
        if self.condition_noise is not None:
            assert condition is not None
            shift = self.condition_noise(condition).chunk(2, dim=-1)
            mean, log_variance = mean + shift[0], log_variance + shift[1]
        deviation = torch.exp(log_variance * (1.0 if self.options.authors_code else 0.5))
        noise = self.sample.to(dtype)
        if self.training:
            noise = torch.randn_like(noise)
        information = mean.new_zeros(())
        if self.coupled:
            coupling = self._coupling_matrix(condition, dtype)
            variance = coupling.square().sum(dim=-1)
            information = 0.5 * variance.log().sum(dim=-1).mean() * mean.shape[-1]
            noise = self._couple(noise, coupling, variance)
        half = noise.shape[-2] // 2
        sign = noise.new_ones(2 * half, 1)
        sign[half:] = -1.0
        noise = sign * mean.unsqueeze(-2) + deviation.unsqueeze(-2) * noise
        generated = [noise.sign() * network(noise.abs()) for network in self.generators]
        frequencies = torch.stack(generated, dim=-3).transpose(-1, -2)
        options = self.options
        divergence = _kl_divergence(mean, deviation, options.prior_scale).sum(dim=(-1, -2)).mean()
        regularizer = options.kl_weight * divergence + options.copula_weight * information
        return frequencies, regularizer

    def _coupling_matrix(self, condition: Tensor | None, dtype: torch.dtype) -> Tensor:
        """L, (K, K) or (batch, K, K)."""
        entries = self.coupling.to(dtype)
        if self.condition_coupling is not None:
            assert condition is not None
            entries = entries + self.condition_coupling(condition.mean(dim=1))
        heads = self.mean.shape[0]
        row, column = torch.tril_indices(heads, heads, offset=-1, device=entries.device)
        matrix = torch.eye(heads, dtype=dtype, device=entries.device)
        matrix = matrix.expand(*entries.shape[:-1], heads, heads).clone()
        matrix[..., row, column] = entries
        return matrix

    def _couple(self, noise: Tensor, coupling: Tensor, variance: Tensor) -> Tensor:
        if self.options.authors_code:
            return coupling.sum(dim=-1)[..., None, None] * noise
        normalized = coupling * variance.rsqrt().unsqueeze(-1)
        return torch.einsum("...hg,gmd->...hmd", normalized, noise)

    def reset_parameters(self) -> None:
        scale = self.options.prior_scale
        init.normal_(self.mean, std=scale)
        init.constant_(
            self.log_variance, math.log(scale) * (1.0 if self.options.authors_code else 2.0)
        )
        if self.coupled:
            init.zeros_(self.coupling)
        for module in self.modules():
            if isinstance(module, _Network):
                module.reset_parameters()
        generator = torch.Generator().manual_seed(self.seed)
        sample = torch.randn(self.sample.shape, generator=generator, device="cpu")
        init.copy_(self.sample, sample)


class Regularized(nn.Module):
    """A module whose latest forward pass left a regulariser for `auxiliary_loss`.

    Attributes:
        options: the options.
        regularizer: a scalar; `None` before the first forward pass and for kernels without noise.
    """

    options: ImplicitKernelConfig
    regularizer: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can be neither copied nor pickled.
        return {**self.__dict__, "regularizer": None}


class _Network(nn.Module):
    """Fully connected layers with leaky ReLU (0.2) between them: `weight_i` (out, in), `bias_i` (out,).

    Raw parameters rather than `nn.Linear`: tools that look for linear layers (adapters, quantisation)
    are meant for the model's own.
    """

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = len(sizes) - 1
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            self.register_parameter(f"weight_{i}", nn.Parameter(torch.empty(fan_out, fan_in)))
            self.register_parameter(f"bias_{i}", nn.Parameter(torch.empty(fan_out)))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.layers):
            weight, bias = self.get_parameter(f"weight_{i}"), self.get_parameter(f"bias_{i}")
            x = nn.functional.leaky_relu(x, 0.2) if i else x
            x = nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        return x

    def reset_parameters(self) -> None:
        """Uniform within ±fan_in^-½, weights and biases (kaiming with a = √5)."""
        for i in range(self.layers):
            weight = self.get_parameter(f"weight_{i}")
            bound = weight.shape[1] ** -0.5
            init.uniform_(weight, -bound, bound)
            init.uniform_(self.get_parameter(f"bias_{i}"), -bound, bound)


def _kl_divergence(mean: Tensor, deviation: Tensor, prior: float) -> Tensor:
    """KL(N(mean, deviation²) ‖ N(0, prior²)), elementwise; the same for ±mean."""
    ratio = (mean.square() + deviation.square()) / (2.0 * prior**2)
    return ratio - torch.log(deviation / prior) - 0.5
