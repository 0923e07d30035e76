"""The contract with Transformers: what models pass to an attention function, and what it means.

The mask is what rules. `is_causal` and `sliding_window` repeat what a given mask already says (no
eager attention in Transformers reads them), so they count only where there is no mask. Without a mask
and without `is_causal=True` everything is visible, as in eager attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from ..masking import (
    CompactMask,
    intersect,
    packed_ranges,
    packed_rows,
    paged_ranges,
    ranges_of,
    selected_blocks,
    selected_keys,
)
from ..ops import KeyRanges
from .base import AttentionCall

#: Keywords with a meaning for attention that no mechanism can honour, each with the remedy.
_REFUSED = {
    "block_table": "paged key/value blocks are read by flash attention only; leave "
    "max_blocks_per_request of the continuous batching config at 0",
    "head_mask": "per-head masks are not supported; prune the heads or multiply the output",
}


def read_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> AttentionCall:
    """Brings the arguments of a Transformers attention function into an `AttentionCall`.

    Keywords: `scaling` (`None`: dim^-½), `dropout`, `position_bias`, `softcap`, `s_aux` or `sinks`,
    `sliding_window`, `is_causal`, `indices`, `block_indices`, `cu_seq_lens_q`/`cu_seq_lens_k`,
    `position_ids`, `cache` (paged), `output_attentions`. Other keywords are the model's own business:
    its forward arguments flow down to here (`use_cache`, `input_ids`, …).

    Raises:
        ValueError: a keyword that would change the attention and cannot be honoured.
    """
    for name, remedy in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attention was called with {name}=<{type(kwargs[name]).__name__}>: {remedy}."
            )

    bias = kwargs.get("position_bias")
    mask: Tensor | KeyRanges | None
    if (cache := kwargs.get("cache")) is not None:
        key, value, mask = _paged(module, query, key, value, cache, kwargs)
        is_causal, window = False, None
    else:
        mask, is_causal, window = _visibility(module, query, key, attention_mask, kwargs)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if (indices := kwargs.get("indices")) is not None:
        mask = _restrict(mask, selected_keys(indices, num_keys))
    if (blocks := kwargs.get("block_indices")) is not None:
        size = int(module.indexer.block_size)  # type: ignore[union-attr, arg-type]
        mask = _restrict(mask, selected_blocks(blocks, size, num_keys, query.shape[1]))

    sinks = kwargs.get("s_aux")
    sinks = kwargs.get("sinks") if sinks is None else sinks
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        attention_mask=mask,
        bias=bias,
        is_causal=is_causal and num_queries > 1,
        sliding_window=window,
        softcap=kwargs.get("softcap"),
        sinks=sinks,
        dropout=float(dropout) if module.training else 0.0,
        return_weights=bool(kwargs.get("output_attentions")) or _weights_are_recorded(),
    )


def _paged(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, cache: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, KeyRanges]:
    """(key, value, ranges) of a batch of sequences whose earlier keys lie in a paged cache.

    Continuous batching gives it to the attention function, which writes the new keys and values and
    gets all of them, sequence by sequence.
    """
    if not isinstance(cache, PagedAttentionCache):
        raise ValueError(
            f"attention was called with cache=<{type(cache).__name__}>: only the PagedAttentionCache "
            "of continuous batching is written by an attention function; pass past_key_values."
        )
    options = dict(kwargs)
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options
    )
    ranges = paged_ranges(
        options["cu_seq_lens_q"],
        options["cu_seq_lens_k"],
        query.shape[2],
        options.get("sliding_window"),
    )
    return key, value, ranges


def _visibility(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor | KeyRanges | None, bool, int | None]:
    """(mask, is_causal, sliding_window) of a call."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    packed = _packed(query, key, attention_mask, kwargs)
    if attention_mask is None:
        # Our mask function never returns None: this one is the model's own, and to its eager attention
        # it means that everything is visible, whatever the attribute `module.is_causal` says.
        is_causal = bool(kwargs.get("is_causal")) and num_queries > 1
        if is_causal and num_queries != num_keys:
            # Without a mask a longer key sequence is the tail of a static cache, not yet written.
            end = torch.arange(1, num_queries + 1, device=query.device, dtype=torch.int32)[None]
            window = kwargs.get("sliding_window")
            start = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
            triangle = KeyRanges(start, end.clamp(max=num_keys))
            return (triangle if packed is None else intersect(triangle, packed)), False, None
        window = kwargs.get("sliding_window") if is_causal else None
        return packed, is_causal, window
    mask: Tensor | KeyRanges = attention_mask
    if isinstance(attention_mask, CompactMask):
        if packed is None and attention_mask.pattern == "full":
            return None, False, None
        fits = attention_mask.shape[2] == num_queries and attention_mask.shape[3] == num_keys
        if packed is None and attention_mask.pattern == "causal" and fits:
            return None, True, None
        ranges = ranges_of(attention_mask)
        # A mask of one query stands for all of them; one that is too long is cut, as eager does.
        rows = (ranges.start.shape[0], num_queries)
        keys = None if ranges.keys is None else ranges.keys[:, :num_keys]
        mask = KeyRanges(ranges.start.expand(rows), ranges.end.expand(rows), keys)
    elif attention_mask.shape[-1] > num_keys:
        mask = attention_mask[..., :num_keys]
    if packed is not None:
        mask = (
            intersect(mask, packed)
            if isinstance(mask, KeyRanges)
            else _restrict(mask, packed.dense(num_keys))
        )
    return mask, False, None


def _packed(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> KeyRanges | None:
    """Sequences packed in one row, from cumulative lengths or from positions that start again."""
    lengths_q, lengths_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if lengths_q is not None:
        if query.shape[0] != 1:
            raise ValueError(
                f"cu_seq_lens_q describes the sequences of one row, but the batch has {query.shape[0]}: "
                "flatten it into one row (DataCollatorWithFlattening does), or pass position_ids."
            )
        lengths_k = lengths_q if lengths_k is None else lengths_k
        return packed_ranges(lengths_q, lengths_k, query.shape[2])
    positions = kwargs.get("position_ids")
    if (
        positions is None
        or not isinstance(attention_mask, CompactMask)
        or attention_mask.is_padded
        or attention_mask.pattern == "full"
        or positions.dim() != 2
        or not positions.shape[1] == query.shape[2] == key.shape[2] == attention_mask.shape[3]
    ):
        return None
    if torch.compiler.is_compiling():
        # A traced mask that is not plainly causal holds its packing already.
        return packed_rows(positions) if attention_mask.pattern == "causal" else None
    # Looked at once a forward pass: every layer gets the same mask and the same positions.
    if attention_mask.packing is None or attention_mask.packing[0] is not positions:
        attention_mask.packing = (positions, packed_rows(positions))
    return attention_mask.packing[1]


def _restrict(mask: Tensor | KeyRanges | None, visible: Tensor) -> Tensor:
    """A mask with a further restriction (bool, true where visible)."""
    if mask is None:
        return visible
    if isinstance(mask, KeyRanges):
        return visible & mask.dense(visible.shape[3])
    if mask.is_floating_point():
        return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
    return visible & (mask != 0)


def _weights_are_recorded() -> bool:
    """Whether Transformers is recording attention weights by hooks around this call."""
    if torch.compiler.is_compiling():
        return False
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)
