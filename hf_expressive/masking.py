"""What a mask means: compact where possible, dense where needed.

Transformers asks a registered mask function for the mask of a batch and hands the result through the
model to the attention function. Ours returns a `CompactMask`: a tensor that says for each query which
range of keys it sees, in O(N) memory, and that turns into the ordinary additive mask (0 visible, the
dtype's minimum hidden, what `eager` gets) as soon as a model computes with it. So a model that slices
the mask, adds a position bias to it or compares it works as with eager attention, and a model that
merely passes it on never pays for N × N numbers.

The mask function never returns `None`: what `None` means is left to each architecture's own code and
differs between them.

Compact: causal, bidirectional, sliding-window, chunked and packed patterns, left and right padding,
any cache, any combination in which each query sees one contiguous range of keys (and keys may be
hidden one by one). Dense: everything else, functions that Transformers marks as arbitrary, and, under
`torch.compile` or export, every pattern but causal, bidirectional and packed causal, because the
others have to be looked at to be recognised.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    find_packed_sequence_indices,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from .ops import KeyRanges

#: Models whose code takes any mask that is not bool for an inverted one, their own eager mask included.
_LOGICAL_MASKS = {"nemotron_asr_streaming_encoder"}
#: Entries of a pattern that are looked at together when it is recognised (bool, so bytes).
_PROBE_ENTRIES = 2**24


# Positions in which Transformers found no second sequence; `None` where it did not look, or found one.
# It looks before each mask that it makes, and the host has to wait for the device to answer.
_unbroken: ContextVar[weakref.ref[Tensor] | None] = ContextVar("_unbroken", default=None)

#: What a mask says without looking at data: everything visible, or the last query at the last key.
Pattern = Literal["full", "causal"]

_WRITTEN = (
    "{} writes into an attention mask that is held in compact form; write into mask.dense(), or use "
    "the out-of-place form of the operation."
)


class CompactMask(torch.Tensor):
    """An additive mask (batch, 1, query, keys) held as the parts of a `KeyRanges`.

    Attributes:
        start, end: see `KeyRanges`. key_mask: its `keys`, which is a name that `torch.compile` needs.
        pattern: the same knowledge without data, where that is enough; else `None`.
        is_padded: whether it comes of a padding mask that hides tokens.
        packing: the last position ids looked at for packed sequences, and what was found.
        share: the share of a sequence that the queries are, see `attention.sequence_share`.
    """

    start: Tensor
    end: Tensor
    key_mask: Tensor | None
    pattern: Pattern | None
    is_padded: bool
    packing: tuple[Tensor, KeyRanges | None] | None
    share: Any

    @staticmethod
    def __new__(
        cls,
        ranges: KeyRanges,
        batch: int,
        num_keys: int,
        dtype: torch.dtype,
        pattern: Pattern | None,
        *,
        is_padded: bool = False,
    ) -> CompactMask:
        mask: CompactMask = torch.Tensor._make_wrapper_subclass(
            cls,
            (batch, 1, ranges.start.shape[1], num_keys),
            dtype=dtype,
            device=ranges.start.device,
        )
        mask.start, mask.end, mask.key_mask = ranges.start, ranges.end, ranges.keys
        mask.pattern = pattern
        mask.is_padded = is_padded
        mask.packing = None
        mask.share = None
        return mask

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CompactMask(shape={tuple(self.shape)}, pattern={self.pattern})"

    def __setitem__(self, index: Any, value: Any) -> None:
        """Refused: a slice of a compact mask is a slice of a copy, and the entry would be lost."""
        raise RuntimeError(_WRITTEN.format("mask[…] = …"))

    def dense(self) -> Tensor:
        """The additive mask (batch, 1, query, keys) that it stands for."""
        visible = ranges_of(self).dense(self.shape[3]).expand(self.shape)
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(visible, zero, torch.finfo(self.dtype).min)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["start", "end"] + ([] if self.key_mask is None else ["key_mask"])
        return names, (self.shape[0], self.shape[3], self.dtype, self.pattern, self.is_padded)

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> CompactMask:
        batch, num_keys, dtype, pattern, is_padded = context
        ranges = KeyRanges(tensors["start"], tensors["end"], tensors.get("key_mask"))
        return CompactMask(ranges, batch, num_keys, dtype, pattern, is_padded=is_padded)

    def moved(self, dtype: torch.dtype, device: torch.device) -> CompactMask:
        """The same mask in another floating dtype or on another device."""
        keys = None if self.key_mask is None else self.key_mask.to(device)
        ranges = KeyRanges(self.start.to(device), self.end.to(device), keys)
        mask = CompactMask(
            ranges, self.shape[0], self.shape[3], dtype, self.pattern, is_padded=self.is_padded
        )
        mask.share = self.share
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._to_copy.default:
            dtype = kwargs.get("dtype") or args[0].dtype
            if dtype.is_floating_point:
                return args[0].moved(dtype, kwargs.get("device") or args[0].device)
        if func._schema.is_mutable and args and isinstance(args[0], CompactMask):
            raise RuntimeError(_WRITTEN.format(func))
        # Pipelines, offloading hooks and checkpointing copy and alias what they pass on.
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return args[0].moved(args[0].dtype, args[0].device)
        if func is aten.slice.Tensor and _slices_nothing(*args):
            return args[0].moved(args[0].dtype, args[0].device)
        densify: Callable[[Any], Any] = lambda x: x.dense() if isinstance(x, CompactMask) else x  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(densify, (args, kwargs))
        return func(*args, **kwargs)


def ranges_of(mask: CompactMask) -> KeyRanges:
    """The ranges of a mask (a function, because `torch.compile` does not follow properties)."""
    return KeyRanges(mask.start, mask.end, mask.key_mask)


def _slices_nothing(
    tensor: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> bool:
    return (start or 0) == 0 and step == 1 and (end is None or end >= tensor.shape[dim])


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """The mask function of every mechanism; arguments are those of Transformers' `eager_mask`.

    Returns:
        A `CompactMask`; the dense additive mask (batch, 1, query, keys) where no compact form is
        known; a dense bool mask for the models in `_LOGICAL_MASKS`.
    """
    if getattr(kwargs.get("config"), "model_type", None) in _LOGICAL_MASKS:
        visible: Any = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return visible
    tracing = torch.compiler.is_compiling() or (
        attention_mask is not None and is_tracing(attention_mask)
    )
    bounds = None
    pattern: Pattern | None = None
    packed = None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        # Left by `mark_positions` in place of a padding mask.
        position_ids, attention_mask = attention_mask - 1, None
        segments: Any = find_packed_sequence_indices(position_ids)
        if mask_function is causal_mask_function and not use_vmap:
            packed = _segment_ranges(segments)
        else:
            mask_function = packed_pattern(mask_function, position_ids, segments)
    if not use_vmap and mask_function is bidirectional_mask_function:
        bounds = _full_bounds(q_length, kv_length, device)
        pattern = "full"
    elif not use_vmap and mask_function is causal_mask_function:
        bounds = _causal_bounds(q_length, kv_length, q_offset, kv_offset, device)
        aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        pattern = "causal" if aligned else None
    elif not use_vmap and not tracing:
        bounds = _probe_bounds(
            mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, device
        )
        # Whatever pattern lets everything through (a window that is not reached) is no mask at all;
        # a model may have asked for it with fewer keys than it hands to attention.
        if bounds is not None and bool((bounds[0] == 0).all() & (bounds[1] == kv_length).all()):
            pattern = "full"
    if bounds is None:
        return eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            dtype=dtype,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
    start, end = bounds
    keys = None
    if attention_mask is not None:
        keys = _visible_keys(attention_mask, kv_length, kv_offset, device)
        if not tracing and bool(keys.all()):
            keys = None
    is_padded = keys is not None
    if keys is not None:
        pattern = None
        start, end = _shrink(start, end, keys)
        if not tracing and _is_unbroken(keys):  # the bounds say it all, and kernels skip by them
            keys = None
    ranges = KeyRanges(start.to(torch.int32), end.to(torch.int32), keys)
    if packed is not None:
        ranges, pattern = intersect(ranges, packed), None
    mask = CompactMask(ranges, batch_size, kv_length, dtype, pattern, is_padded=is_padded)
    if not tracing and (known := _unbroken.get()) is not None:
        positions = known()
        mask.packing = None if positions is None else (positions, None)
    return mask


def remember_unbroken(position_ids: Tensor | None) -> None:
    """Spares the next masks a look at positions that have been looked at.

    Args:
        position_ids: (batch or 1, query), each one more than the one before; `None` to forget.
    """
    _unbroken.set(None if position_ids is None else weakref.ref(position_ids))


def mark_positions(position_ids: Tensor, batch_size: int, *, is_packed: bool) -> Tensor:
    """Positions in the place of a padding mask, (batch, query) int32 without zeros.

    Under tracing nobody can look whether a row holds several sequences. Transformers assumes so where
    there is no cache, and wraps the pattern into a function that hides which pattern it was; with an
    empty cache it assumes the contrary. So the hook on `_preprocess_mask_arguments` takes the
    assumption back and hands the positions over in this form, which no padding mask has at that point
    (they are bool).

    Args:
        position_ids: (batch or 1, query).
        batch_size: rows of the batch.
        is_packed: whether each jump of the positions starts a sequence; else only where they all
            start again, see `packed_rows`.
    """
    if not is_packed:
        index = torch.arange(position_ids.shape[1], device=position_ids.device)
        position_ids = torch.where(_start_again(position_ids), position_ids, index)
    return position_ids.expand(batch_size, -1).to(torch.int32) + 1


def packed_pattern(
    mask_function: Callable[..., Any], position_ids: Tensor, segments: Tensor
) -> Callable[..., Any]:
    """A pattern within each sequence of a row, at the positions that a token has in its sequence."""

    def function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Any:
        same = segments[batch, query] == segments[batch, key]
        return same & mask_function(
            batch, head, position_ids[batch, query], position_ids[batch, key]
        )

    return function


def _segment_ranges(segments: Tensor) -> KeyRanges:
    """Ranges from the index of each query's sequence within its row, (batch, query), ascending."""
    start = torch.searchsorted(segments, segments)
    end = torch.searchsorted(segments, segments, right=True)
    return KeyRanges(start.to(torch.int32), end.to(torch.int32))


def _full_bounds(
    q_length: int, kv_length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    start = torch.zeros(1, q_length, dtype=torch.int64, device=device)
    return start, torch.full_like(start, kv_length)


def _causal_bounds(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    position = torch.arange(q_length, device=device) + q_offset
    end = (position + 1 - kv_offset).clamp(0, kv_length)[None]
    return torch.zeros_like(end), end


def _probe_bounds(
    mask_function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor] | None:
    """Bounds of any pattern in which each query sees one range of keys; `None` for others.

    The pattern is evaluated a few queries at a time, so no N × N tensor exists.
    """
    starts, ends = [], []
    contiguous = torch.ones((), dtype=torch.bool, device=device)
    step = max(_PROBE_ENTRIES // max(batch_size * kv_length, 1), 1)
    for first in range(0, q_length, step):
        visible: Any = sdpa_mask(
            batch_size=batch_size,
            q_length=min(step, q_length - first),
            kv_length=kv_length,
            q_offset=q_offset + first,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            device=device,
        )
        if visible.shape[1] != 1:
            return None
        visible = visible[:, 0].to(torch.uint8)
        count = visible.sum(dim=-1, dtype=torch.int64)
        start = visible.argmax(dim=-1)
        end = torch.where(count > 0, kv_length - visible.flip(-1).argmax(dim=-1), start)
        contiguous &= (end - start == count).all()
        starts.append(start)
        ends.append(end)
    if not bool(contiguous):
        return None
    return torch.cat(starts, dim=1), torch.cat(ends, dim=1)


def _visible_keys(
    attention_mask: Tensor, kv_length: int, kv_offset: int, device: torch.device | str
) -> Tensor:
    """Padding mask (batch, seen tokens) → visible keys (batch, keys); keys beyond it are hidden."""
    keys = attention_mask.to(device=device, dtype=torch.bool)
    missing = kv_length + kv_offset - keys.shape[-1]
    if missing > 0:
        keys = torch.nn.functional.pad(keys, (0, missing))
    return keys[:, kv_offset : kv_offset + kv_length]


def _shrink(start: Tensor, end: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the bounds inwards to the first and last visible key of each row of the batch."""
    flags = keys.to(torch.uint8)
    first = flags.argmax(dim=-1, keepdim=True)
    last = keys.shape[-1] - flags.flip(-1).argmax(dim=-1, keepdim=True)
    last = torch.where(keys.any(dim=-1, keepdim=True), last, first)
    return torch.maximum(start, first), torch.minimum(end, last)


def _is_unbroken(keys: Tensor) -> bool:
    """Whether the visible keys of each row of the batch follow one another, as with mere padding."""
    begins = keys[:, 1:] & ~keys[:, :-1]
    return bool((begins.sum(-1) + keys[:, 0] <= 1).all())


def packed_ranges(boundaries_q: Tensor, boundaries_k: Tensor, num_queries: int) -> KeyRanges:
    """Ranges of a packed row from cumulative lengths (sequences + 1,), as flash attention takes them."""
    position, segment = _segments(boundaries_q, num_queries)
    start, end = boundaries_k[segment], boundaries_k[segment + 1]
    # Queries behind the last boundary belong to no sequence.
    end = torch.where(position < boundaries_q[-1], end, start)
    return KeyRanges(start[None].to(torch.int32), end[None].to(torch.int32))


def paged_ranges(
    boundaries_q: Tensor, boundaries_k: Tensor, num_queries: int, sliding_window: int | None
) -> KeyRanges:
    """Ranges of a batch of a paged cache: the last query of a sequence sees its last key.

    Args:
        boundaries_q, boundaries_k: cumulative lengths of queries and of keys, (sequences + 1,).
        num_queries: queries of all sequences together.
        sliding_window: number of keys that a query sees, itself counted; `None` for all.
    """
    whole = packed_ranges(boundaries_q, boundaries_k, num_queries)
    position, segment = _segments(boundaries_q, num_queries)
    end = whole.end - (boundaries_q[segment + 1] - 1 - position)[None]
    start = whole.start
    if sliding_window is not None:
        start = torch.maximum(start, end - sliding_window)
    end = torch.where(whole.end > whole.start, end, start)
    return KeyRanges(start.to(torch.int32), end.to(torch.int32))


def _segments(boundaries: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(position, sequence) of every place of a row that holds several sequences."""
    position = torch.arange(length, device=boundaries.device)
    segment = torch.searchsorted(boundaries, position, right=True) - 1
    return position, segment.clamp(max=boundaries.shape[0] - 2)


def packed_rows(position_ids: Tensor) -> KeyRanges | None:
    """Ranges of rows that hold several sequences each, read off positions that start again.

    Args:
        position_ids: (batch or 1, query). A sequence starts at 0 or at the first position of its row
            (RoBERTa's positions start at 2).

    Returns:
        For each query the range of its own sequence, or `None` where no row holds two sequences or
        positions jump to anything else. Under tracing never `None`, which would need a look at data.
    """
    length = position_ids.shape[1]
    restart = _jumps(position_ids)
    restart[:, 0] = True
    packed = _start_again(position_ids)
    tracing = torch.compiler.is_compiling()
    if not tracing and not bool(packed):
        return None
    index = torch.arange(length, device=position_ids.device).expand(position_ids.shape)
    start = torch.where(restart, index, 0).cummax(dim=1).values
    # The end of a sequence is the next restart.
    following = torch.where(restart, index, length).roll(-1, dims=1)
    following[:, -1] = length
    end = following.flip(1).cummin(dim=1).values.flip(1)
    if tracing:
        start, end = torch.where(packed, start, 0), torch.where(packed, end, length)
    return KeyRanges(start.to(torch.int32), end.to(torch.int32))


def _jumps(position_ids: Tensor) -> Tensor:
    """Where a position does not follow the one before it, bool."""
    return torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=1) != 1


def _start_again(position_ids: Tensor) -> Tensor:
    """Whether positions jump, and only to the start of a sequence, bool scalar."""
    jumps = _jumps(position_ids)
    starts = (position_ids == 0) | (position_ids == position_ids[:, :1])
    return jumps.any() & (starts | ~jumps).all()


def intersect(one: KeyRanges, other: KeyRanges) -> KeyRanges:
    """Keys that both let through."""
    keys = one.keys if other.keys is None else other.keys
    if one.keys is not None and other.keys is not None:
        keys = one.keys & other.keys
    return KeyRanges(torch.maximum(one.start, other.start), torch.minimum(one.end, other.end), keys)


def selected_keys(indices: Tensor, num_keys: int) -> Tensor:
    """(batch, query, selected) key positions, −1 unused → bool (batch, 1, query, keys)."""
    selected = torch.zeros(
        *indices.shape[:2], num_keys + 1, dtype=torch.bool, device=indices.device
    )
    # Unused slots are written to one extra column, which is cut off.
    selected.scatter_(2, torch.where(indices < 0, num_keys, indices), True)
    return selected[:, None, :, :num_keys]


def selected_blocks(
    block_indices: Tensor, block_size: int, num_keys: int, num_heads: int
) -> Tensor:
    """(batch, heads', query, selected) key blocks, −1 unused → bool (batch, heads, query, keys)."""
    num_blocks = -(-num_keys // block_size)
    shape = (*block_indices.shape[:3], num_blocks + 1)
    blocks = torch.zeros(shape, dtype=torch.bool, device=block_indices.device)
    blocks.scatter_(3, torch.where(block_indices < 0, num_blocks, block_indices), True)
    keys = blocks[..., :num_blocks].repeat_interleave(block_size, dim=3)[..., :num_keys]
    return keys.repeat_interleave(num_heads // block_indices.shape[1], dim=1)
