"""A plain dense attention function for the Transformers registry: the independent witness.

It materialises the full weight matrix and follows, keyword by keyword, what the models' own eager
functions do. The response to the score is selectable:

    exp     w = exp(z)            reproduces each model's eager softmax
    hill    w = z² / (1 + z²)     expressive attention
    kernel  w = (z² + ε) · exp(‖k‖²/(2√d))    z = φ(q)·φ(k), a learned spectral kernel

with z = softcap(scaling · q·k). Everything additive in softmax attention (float masks, position
biases) multiplies the weight by its exponential, a sink s adds exp(s) to the row sum, a hidden key
has weight zero. Nothing here imports the package under test.

B batch, H query heads, K key heads, Q queries, N keys, D head size, E value head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

SOFTMAX = "dense_exp"
EXPRESSIVE = "dense_hill"
KERNEL = "dense_kernel"
BOOLEAN = "_boolean"

# Arguments that models pass along and that do not change what attention computes: caller's options,
# and facts the mask already states (a window, positions, causality). Anything else is unknown and
# raises.
INFORMATION = {
    "cache_position",
    "deterministic",
    "grid_thw",
    "is_causal",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
    "vision_feature_layer",
}


def _selected_keys(indices: Tensor, keys: int) -> Tensor:
    """Visibility (B, 1, Q, N) from selected key positions (B, Q, k); -1 marks an unused place."""
    chosen = torch.zeros(*indices.shape[:2], keys + 1, dtype=torch.bool, device=indices.device)
    places = indices.long().masked_fill(indices < 0, keys)
    return chosen.scatter(-1, places, True)[:, None, :, :keys]


def _selected_blocks(blocks: Tensor, block_size: int, heads: int, keys: int) -> Tensor:
    """Visibility (B, H, Q, N) from selected key blocks (B, K, Q, n); -1 marks an unused place."""
    count = -(-keys // block_size)
    chosen = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool, device=blocks.device)
    chosen = chosen.scatter(-1, blocks.long().masked_fill(blocks < 0, count), True)[..., :count]
    per_key = chosen.repeat_interleave(block_size, dim=-1)[..., :keys]
    return per_key.repeat_interleave(heads // blocks.shape[1], dim=1)


def _normalised_exp(score: Tensor, bias: Tensor, visible: Tensor, sink: Tensor | None) -> Tensor:
    logits = (score + bias).masked_fill(~visible, float("-inf"))
    if sink is not None:
        logits = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], dim=-1)
    return torch.softmax(logits, dim=-1).nan_to_num(0.0)[..., : score.shape[-1]]


def _normalised_hill(score: Tensor, bias: Tensor, visible: Tensor, sink: Tensor | None) -> Tensor:
    square = score.square()
    weight = square / (1 + square) * bias.exp() * visible
    total = weight.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + sink.exp()
    return weight / torch.where(total > 0, total, torch.ones_like(total))


def _normalised_square(score: Tensor, bias: Tensor, visible: Tensor, sink: Tensor | None) -> Tensor:
    # A row that sees no key is empty; softmax would spread its weight evenly.
    return _normalised_exp((score.square() + 1e-5).log(), bias, visible & (bias > -9000), sink)


def _spectral(module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> Any:
    """Features of queries and keys, (B, H, Q, 2M) and (B, K, N, 2M), and log-magnitudes (B, K, 1, N).

    φ(x) = [cos 2πW₁x + cos 2πW₂x ; sin 2πW₁x + sin 2πW₂x]/(2√M), and lengths such that scaling = d^-½.
    """
    weight = module.mechanism.kernel.density.weight.to(query.dtype)  # type: ignore[union-attr]
    stretch = (scaling * query.shape[-1] ** 0.5) ** 0.5
    features = []
    for x in (query, key):
        heads = weight.repeat_interleave(x.shape[1] // weight.shape[0], dim=0)
        phase = 2 * torch.pi * torch.einsum("bhnd,hsdm->bhsnm", x * stretch, heads)
        both = torch.cat([phase.cos().sum(dim=2), phase.sin().sum(dim=2)], dim=-1)
        features.append(both / (2 * weight.shape[-1] ** 0.5))
    return *features, (key.square().sum(dim=-1) * (scaling / 2))[:, :, None]


def _dense_attention(
    normalised: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Callable[..., Any]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        position_bias: Tensor | None = None,
        s_aux: Tensor | None = None,
        sinks: Tensor | None = None,
        indices: Tensor | None = None,
        block_indices: Tensor | None = None,
        **information: Any,
    ) -> tuple[Tensor, Tensor]:
        """(B, H, Q, D), (B, K, N, D), (B, K, N, E) -> output (B, Q, H, E), weights (B, H, Q, N)."""
        given = {name for name, value in information.items() if value is not None}
        if unknown := given - INFORMATION:
            raise TypeError(
                f"{type(module).__name__} passes unknown arguments to attention: {sorted(unknown)}"
            )
        heads, keys = query.shape[1], key.shape[2]
        magnitude = query.new_zeros(())
        if normalised is _normalised_square:
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            query, key, magnitude = _spectral(module, query, key, scaling)
            magnitude = magnitude.repeat_interleave(heads // magnitude.shape[1], dim=1)
            scaling = 1.0
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)

        score = (query @ key.transpose(-1, -2)) * (
            query.shape[-1] ** -0.5 if scaling is None else scaling
        )
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)

        bias = magnitude
        visible = torch.ones((), dtype=torch.bool, device=score.device)
        if position_bias is not None:
            bias = bias + position_bias
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            visible = attention_mask
        elif attention_mask is not None:
            bias = bias + attention_mask
        if indices is not None:
            visible = visible & _selected_keys(indices, keys)
        if block_indices is not None:
            block_size = int(module.indexer.block_size)  # type: ignore[union-attr, arg-type]
            visible = visible & _selected_blocks(block_indices, block_size, heads, keys)

        sink = sinks
        if s_aux is not None:
            sink = s_aux.reshape(1, -1, 1, 1)
        weights = normalised(score, bias, visible, sink).to(value.dtype)
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return forward


def _boolean_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(
        *args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    )


def switch(model: nn.Module, before: str, after: str) -> None:
    """Runs every part of a model that runs `before` on `after`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation_internal", None) == before:
            config._attn_implementation_internal = after  # type: ignore[union-attr]


def register() -> None:
    """Make both names known with dense float masks; with `_boolean` appended, with boolean ones."""
    for name, normalised in (
        (SOFTMAX, _normalised_exp),
        (EXPRESSIVE, _normalised_hill),
        (KERNEL, _normalised_square),
    ):
        for suffix, mask in (("", eager_mask), (BOOLEAN, _boolean_mask)):
            AttentionInterface.register(name + suffix, _dense_attention(normalised))
            AttentionMaskInterface.register(name + suffix, mask)
