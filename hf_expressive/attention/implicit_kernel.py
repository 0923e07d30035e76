"""Implicit kernel attention in an attention module: densities, magnitudes, conditioning, the call.

Cost beside softmax attention: the features. A cache stores keys, not features; the features of cached
keys are remembered from one decoding step to the next (see `key_memory`), in memory for d + 2M numbers
a key, on GPUs a quarter more, beside the cache's 2d, unless `cache_features` is off. Under
`torch.compile` and in CUDA graphs they are computed again. Measured on one CPU core with 2048 cached
keys, 8 heads of size 64 and M = 64, in processor time: a decoding step 6 to 8 ms (17 to 22 without
remembering), against 2 to 4 ms for the RBF kernel and 0.6 ms for torch's softmax attention; a causal
pass over 2048 tokens 200 to 270 ms, against 130 to 170 and 70 ms. On an H200 with 32768 keys, batch
16, 32 query and 8 key/value heads of size 128: a step 1.1 ms (2.6 without remembering), against 0.47
ms for softmax attention.

Weight decay pulls frequencies, noise and exponents towards 0, which is the constant kernel (p = 2 for
exponents), not a neutral choice. `Trainer` decays them like any weight unless they are taken out:

    class MyTrainer(Trainer):
        def get_decay_parameter_names(self, model):
            return [n for n in super().get_decay_parameter_names(model) if ".mechanism." not in n]

PEFT trains and saves them as `LoraConfig(modules_to_save=hf_expressive.modules_to_save(model))`; without
that they stay frozen, and an adapter does not contain them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..config import ImplicitKernelConfig, MechanismConfig
from ..discovery import AttentionModule, attention_modules, head_dim, num_heads, num_key_value_heads
from ..ops import KeyRanges
from ..ops.functional import is_exporting
from ..ops.implicit_kernel import (
    in_unit_lengths,
    kernel_features,
    log_magnitude,
    unit_length,
)
from ..ops.problem import HIDDEN
from ..ops.response import Response
from ..ops.triton import features as fused_features
from .base import SOFTMAX, About, AttentionCall, Mechanism
from .key_memory import KeyMemory
from .spectral_density import GeneratedFrequencies, LearnedFrequencies, Regularized


class Evaluated(NamedTuple):
    """What a `SpectralKernel` makes of a call; `None` where there is none.

    Attributes:
        frequencies: (key/value heads, S, dim, M), or with the batch in front.
        key_features: (batch, key/value heads, keys, 2M).
        key_bias: log-magnitudes of the keys, (batch, key/value heads, keys).
        regularizer: of the noise, a scalar.
    """

    frequencies: Tensor | None = None
    key_features: Tensor | None = None
    key_bias: Tensor | None = None
    regularizer: Tensor | None = None


class SpectralKernel(nn.Module):
    """Everything that implicit kernel attention learns in one layer; a module that PEFT can save.

    Parameters: `log_exponent`, (key/value heads,), with p = 1 + exp(log_exponent), if p is learned;
    `density`, see `spectral_density`, unless the kernel is the RBF one.

    Args:
        options: the options.
        heads: key/value heads.
        dim: size of a head.
        conditional: whether the noise depends on the mean query and key.
        layer: index of the layer.
    """

    def __init__(
        self, options: ImplicitKernelConfig, heads: int, dim: int, *, conditional: bool, layer: int
    ) -> None:
        super().__init__()
        self.options = options
        self.heads = heads
        self.dim = dim
        self.conditional = conditional
        self.memory = KeyMemory()
        if options.p == "learned":
            self.log_exponent = nn.Parameter(torch.empty(heads))
        self.density: LearnedFrequencies | GeneratedFrequencies | None = None
        if options.generates_frequencies:
            self.density = GeneratedFrequencies(
                options, heads, dim, conditional=conditional, layer=layer
            )
        elif options.kernel != "rbf":
            self.density = LearnedFrequencies(options, heads, dim)

    def forward(self, call: AttentionCall) -> Evaluated:
        """Everything of a call's attention that depends on what is learned.

        Raises:
            ValueError: a call that does not fit the parameters, or that cannot be conditioned.
        """
        given = (call.key.shape[1], call.key.shape[3])
        if self.options.needs_parameters and given != (self.heads, self.dim):
            raise ValueError(
                f"the kernel has parameters for {self.heads} key/value heads of size {self.dim}, but "
                f"was called with {given[0]} of size {given[1]}."
            )
        with torch.autocast(call.key.device.type, enabled=False):
            exponent = self._exponent()
            if self.density is None:
                return Evaluated(key_bias=self._key_bias(call.key, call.scaling, exponent))
            condition = mean_query_and_key(call) if self.conditional else None
            frequencies, regularizer = self.density(condition)

            def of_keys(key: Tensor) -> tuple[Tensor, ...]:
                key_bias = self._key_bias(key, call.scaling, exponent)
                assert key_bias is not None
                return kernel_features(key, frequencies, call.scaling), key_bias

            if not self._decodes(call):
                self.memory.clear()
                key, key_bias = of_keys(call.key)
            elif call.key.is_cuda:
                key, key_bias = self.memory.features(
                    call.key,
                    frequencies,
                    exponent,
                    factor=unit_length(call.key, call.scaling),
                    magnitude_factor=0.5 * self._magnitude_scale(call.key, call.scaling),
                )
            else:
                others = (
                    torch.tensor(call.scaling, dtype=torch.float64),
                    torch.as_tensor(exponent),
                )
                key, key_bias = self.memory.compute(of_keys, call.key, (frequencies, *others))
            return Evaluated(frequencies, key, key_bias, regularizer)

    def _decodes(self, call: AttentionCall) -> bool:
        """Whether a call looks like a step with a cache, where remembering keys pays."""
        if not self.options.cache_features:
            return False
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if call.query.shape[2] >= call.key.shape[2]:
            return False
        # A captured graph would go on using memory that the next sequence gives back.
        return not call.key.is_cuda or (
            fused_features.unsupported_rows(call.key) is None
            and not torch.cuda.is_current_stream_capturing()
        )

    def _exponent(self) -> float | Tensor:
        if self.options.p == "learned":
            # 1 + exp(0) is exactly 2 in every dtype that the parameter may be cast to.
            return 1.0 + self.log_exponent.float().exp()
        return self.options.p

    def _magnitude_scale(self, key: Tensor, scaling: float) -> float:
        """1/√d of the magnitudes: in the paper; the published code has d^-¼."""
        return scaling * (key.shape[-1] ** 0.25 if self.options.authors_code else 1.0)

    def _key_bias(self, key: Tensor, scaling: float, exponent: float | Tensor) -> Tensor | None:
        options = self.options
        dropout = options.norm_dropout if self.training else 0.0
        is_rbf = options.kernel == "rbf"
        if is_rbf and options.p == 2.0 and not options.authors_code and dropout == 0.0:
            return None
        key_bias = log_magnitude(key, exponent, self._magnitude_scale(key, scaling))
        if dropout > 0.0:
            key_bias = nn.functional.dropout(key_bias, dropout)
        return key_bias - log_magnitude(key, 2.0, scaling) if is_rbf else key_bias

    def reset_parameters(self) -> None:
        if self.options.p == "learned":
            init.zeros_(self.log_exponent)
        if self.density is not None:
            self.density.reset_parameters()


class ImplicitKernelAttention(Regularized, Mechanism):
    """Weights (k(q, k)² + ε) · exp(‖k‖_p²/(2√d)), row-normalised, k the kernel of a learned density.

    The module's `scaling` stands for the paper's 1/√d; where it differs from d^-½, queries and keys
    are first brought to the lengths they would have there (see `implicit_kernel_attention`). One
    kernel a key/value head: the query heads of a group share it, and the features of a key are
    computed once. The query's magnitude is common to its row and cancels.

    Magnitude dropout takes the magnitude of a key from all queries of its head at once; for the RBF
    kernel, too, it is the magnitude ‖k‖_p², not the kernel, that is dropped.

    Args:
        options, layer, heads, kv_heads: see `Mechanism`.
        head_dim: size of a head's queries and keys, `None` where unknown.
        encoder: whether the attention module is the self-attention of an encoder.

    Raises:
        ValueError: parameters that an architecture's sizes are not known for; a copula of one head.
    """

    about = About(
        name="implicit kernel attention",
        explanation=(
            "Softmax attention multiplies a similarity, the RBF kernel of query and key, by a "
            "magnitude, the exponential of the key's squared L2 norm. Implicit kernel attention "
            "keeps this form and changes both: the kernel is built from Fourier features of a "
            "spectral density that can be learned, unless `kernel` is rbf, and the norm is an Lp "
            "norm. The weights of a query are divided by their sum. A mask multiplies a weight by "
            "zero."
        ),
        formula=(
            "K_ij = (φ(q_i)·φ(k_j))² + epsilon, or for rbf exp(-‖q_i - k_j‖² / (2√d))\n"
            "w_ij = K_ij · exp(‖k_j‖_p² / (2√d))\n"
            "out_i = Σ_j w_ij v_j / Σ_j w_ij"
        ),
        options=(
            "`kernel` tells how φ is made, from `num_features` frequencies a density; `p` belongs to "
            "the norm. `softmax_layers` and `softmax_heads` count what keeps softmax attention."
        ),
        source=(
            "K. Song, Y. Jung, D. Kim, I.-C. Moon, AAAI 2021, "
            "[arXiv:2006.06147](https://arxiv.org/abs/2006.06147)"
        ),
    )

    def __init__(
        self,
        options: MechanismConfig,
        *,
        layer: int,
        heads: int | None,
        kv_heads: int | None,
        head_dim: int | None = None,
        encoder: bool = False,
    ) -> None:
        super().__init__(options, layer=layer, heads=heads, kv_heads=kv_heads)
        self.options = options = cast(ImplicitKernelConfig, options)
        square = Response("square", epsilon=options.epsilon)
        self.response = SOFTMAX if options.kernel == "rbf" else square
        self.kernel: SpectralKernel | None = None
        learned = options.needs_parameters
        if learned and (heads is None or kv_heads is None or head_dim is None):
            raise ValueError(
                f"kernel={options.kernel!r}, p={options.p!r} need the number of heads and their size, "
                "and this architecture's attention module does not tell them; use kernel='rbf' with a "
                "number for p."
            )
        # Parameters of heads that stay softmax would never receive a gradient.
        ours = 0 if self.softmax_layer else 1
        if heads is not None and kv_heads is not None:
            ours *= kv_heads - self.softmax_heads * kv_heads // heads
        if ours == 0:
            return
        if options.kernel == "copula" and ours == 1:
            raise ValueError(
                "kernel='copula' couples key/value heads, and there is only one; use "
                "kernel='implicit', which is the same for one head."
            )
        conditional = options.generates_frequencies and (
            options.condition == "mean" or (options.condition == "auto" and encoder)
        )
        self.kernel = SpectralKernel(
            options, ours, head_dim or 0, conditional=conditional, layer=layer
        )

    @classmethod
    def of(cls, options: MechanismConfig, found: AttentionModule) -> Self:
        return cls(
            options,
            layer=found.layer,
            heads=num_heads(found.module),
            kv_heads=num_key_value_heads(found.module),
            head_dim=head_dim(found.module),
            encoder=is_encoder_self_attention(found),
        )

    def evaluate(self, call: AttentionCall, heads: slice) -> tuple[Tensor, Tensor | None]:
        assert self.kernel is not None
        frequencies, key, key_bias, regularizer = self.kernel(call)
        # An exported program has no module to leave it on.
        if not is_exporting():
            self.regularizer = regularizer
        if frequencies is None:
            return call.attend(self.response, call.scaling, key_bias)
        if call.softcap is not None:
            raise ValueError(
                f"kernel={self.options.kernel!r} has no logit that softcap={call.softcap} could cap "
                "(its values lie between −1 and 1); use kernel='rbf', or set the model's attention "
                "soft-capping to None in its config."
            )
        query = kernel_features(call.query, frequencies, call.scaling)
        return dataclasses.replace(call, query=query, key=key).attend(self.response, 1.0, key_bias)

    def reset_parameters(self) -> None:
        if self.kernel is not None:
            self.kernel.reset_parameters()


_NOT_SELF = re.compile(r"cross|enc_?dec|encoder_?(attn|attention)", re.IGNORECASE)


def is_encoder_self_attention(found: AttentionModule) -> bool:
    """Whether an attention module may look at the whole sequence: only where nothing speaks against it.

    Its model says of no attention module that it is causal or belongs to a decoder, it says itself
    that it is not causal, and neither its name nor its class speaks of cross-attention.
    """
    if getattr(found.module, "is_causal", None) is not False:
        return False
    if getattr(found.module, "is_cross_attention", False):
        return False
    if _NOT_SELF.search(found.name) or _NOT_SELF.search(type(found.module).__name__):
        return False
    siblings = [other.module for other in attention_modules(found.owner)]
    return not any(
        getattr(module, "is_causal", None) is True or getattr(module, "is_decoder", None) is True
        for module in siblings
    )


def mean_query_and_key(call: AttentionCall) -> Tensor:
    """Mean query and key of each key/value head over the visible positions, (batch, K, 2 · dim).

    In lengths of a module with scaling d^-½; a group's queries are averaged, too.

    Raises:
        ValueError: queries that see different keys, so that the mean would show them what the mask
            hides. (Not checked under `torch.compile`, where values cannot be looked at.)
    """
    kv_heads = call.key.shape[1]
    query = in_unit_lengths(call.query, call.scaling).unflatten(1, (kv_heads, -1)).mean(dim=2)
    key = in_unit_lengths(call.key, call.scaling)
    visible = _common_keys(call)
    if visible is None:
        return torch.cat([query.mean(dim=2), key.mean(dim=2)], dim=-1)
    weight = visible[:, None, :, None].to(key.dtype)
    count = weight.sum(dim=2).clamp_min(1.0)
    means = [(x * weight).sum(dim=2) / count for x in (query, key)]
    return torch.cat(means, dim=-1)


def _common_keys(call: AttentionCall) -> Tensor | None:
    """The keys that all queries of a batch item see, bool (batch or 1, keys); `None`: every key."""
    mask, num_keys = call.attention_mask, call.key.shape[2]
    differ = call.is_causal or call.sliding_window is not None or call.query.shape[2] != num_keys
    visible: Tensor | None = None
    unequal = []
    if isinstance(mask, KeyRanges):
        unequal += [mask.start != mask.start[:, :1], mask.end != mask.end[:, :1]]
        index = torch.arange(num_keys, device=call.key.device)
        visible = (index >= mask.start[:, :1]) & (index < mask.end[:, :1])
        visible = visible if mask.keys is None else visible & mask.keys
    elif mask is not None or call.bias is not None:
        for tensor in (mask, call.bias):
            if tensor is not None:
                seen = tensor > HIDDEN if tensor.is_floating_point() else tensor != 0
                unequal.append(seen != seen[:, :1, :1])
                seen = seen[:, 0, 0].expand(-1, num_keys)
                visible = seen if visible is None else visible & seen
    if not differ and not torch.compiler.is_compiling():
        differ = any(bool(part.any()) for part in unequal)
    if differ:
        raise ValueError(
            "condition='mean' makes every position depend on all of its sequence, but here the "
            "queries do not all see the same keys (a causal, windowed or packed mask, "
            "cross-attention, context parallelism, or a cache); use condition='constant'."
        )
    return visible
