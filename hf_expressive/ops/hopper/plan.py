"""Which keys each tile of queries sees, worked out on the device before the kernel proper starts.

One small launch turns causality, sliding window and `KeyRanges` into the same two tables, so that the
attention kernels look up what is visible. A call without `KeyRanges` needs none: they compute it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import AttentionProblem
from ..triton.host import launch
from ..triton.launch import ceil_div, element_strides, key_runs, shown_keys
from ..triton.tiles import store_rows

#: Queries of a tile; its two halves belong to one consumer each.
ROWS = 128
#: Numbers a tile in `Plan.tiles`.
FIELDS = 8
#: Keys of a block; so many are not few.
KEYS = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """The tables of one call. Letters: R is B, or 1 where all sequences of a batch share a pattern.

    Args:
        rows: int32, (2, R, tiles · `ROWS`): first visible key of each query and one past the last, for
            all that `KeyRanges.keys` hides between them; queries past the last one repeat its bounds.
        tiles: int32, (R, tiles, `FIELDS`): first visible key of any query of the tile, one past the last
            one, and for both halves [start, end) of keys that all of its queries see: with
            `KeyRanges.keys` no more than their first unbroken run. Then, with `KeyRanges.keys`, for both
            halves how many keys all of its queries see, exact up to `KEYS`.
        count: tiles of one head.
    """

    rows: Tensor
    tiles: Tensor
    count: int

    @property
    def patterns(self) -> int:
        return self.tiles.shape[0]


@triton.jit(
    do_not_specialize=["range_batch", "keys_batch", "num_queries", "num_keys", "left", "right"]
)
def plan_kernel(
    start,
    end,
    keys,
    runs,
    rows,
    tiles,
    range_batch,
    keys_batch,
    runs_batch,
    num_queries,
    num_keys,
    left,
    right,
    ROWS: tl.constexpr,
    FIELDS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tl.program_id(0)
    pattern = tl.program_id(1)
    half = tl.arange(0, 2)[:, None]
    index = tile * ROWS + half * (ROWS // 2) + tl.arange(0, ROWS // 2)[None, :]
    query = tl.minimum(index, num_queries - 1)
    diagonal = query + (num_keys - num_queries)
    first = tl.maximum(diagonal - left + 1, 0)
    last = tl.minimum(diagonal + right, num_keys)
    unbroken = num_keys
    if start is not None:
        place = pattern.to(tl.int64) * range_batch + query
        first = tl.maximum(first, tl.load(start + place))
        last = tl.minimum(last, tl.load(end + place))
    if runs is not None:
        runs += pattern * runs_batch
        first = tl.maximum(first, tl.load(runs))
        last = tl.minimum(last, tl.load(runs + 1))
        unbroken = tl.load(runs + 2)
    width = tl.num_programs(0) * ROWS
    tl.store(rows + pattern * width + index, first)
    tl.store(rows + (tl.num_programs(1) + pattern) * width + index, last)

    seen = first < last
    entry = tiles + (pattern * tl.num_programs(0) + tile) * FIELDS
    tl.store(entry, tl.min(tl.min(tl.where(seen, first, num_keys - 1), 1), 0))
    tl.store(entry + 1, tl.max(tl.max(tl.where(seen, last, 0), 1), 0))
    both = tl.arange(0, 2)
    tl.store(entry + 2 + 2 * both, tl.max(first, 1))
    tl.store(entry + 3 + 2 * both, tl.minimum(tl.min(last, 1), unbroken))
    if keys is not None:
        keys += pattern.to(tl.int64) * keys_batch
        start = tl.max(first, 1)
        end = tl.min(last, 1)
        count = tl.zeros((2,), tl.int32)
        while tl.max(((start < end) & (count < KEYS)).to(tl.int32), 0) > 0:
            key = start[:, None] + tl.arange(0, KEYS)[None, :]
            shown = tl.load(keys + key, mask=key < end[:, None], other=0) != 0
            count += tl.sum(shown.to(tl.int32), 1)
            start += KEYS
        tl.store(entry + 6 + both, count)


@triton.jit(do_not_specialize=["heads", "num_queries", "patterns"])
def empty_kernel(
    tiles,
    out,
    log_normalizer,
    heads,
    num_queries,
    patterns,
    strides,
    VALUE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.program_id(1)
    pattern = tl.minimum(row // heads, patterns - 1)
    entry = tiles + (pattern * tl.num_programs(1) + tile) * FIELDS
    if tl.load(entry) < tl.load(entry + 1):
        return
    query = tile * ROWS + tl.arange(0, ROWS)
    zero = tl.zeros((ROWS, VALUE_SIZE), tl.float32)
    store_rows(
        out, strides, row // heads, row % heads, query, num_queries, zero, VALUE_SIZE, VALUE_SIZE
    )
    place = row.to(tl.int64) * num_queries + query
    tl.store(log_normalizer + place, float("-inf"), mask=query < num_queries)


def reach(problem: AttentionProblem) -> tuple[int, int]:
    """(left, right): by causality and window a query at diagonal d sees d − left < j < d + right."""
    everything = problem.query.shape[2] + problem.key.shape[2]
    left = everything if problem.sliding_window is None else problem.sliding_window
    return left, 1 if problem.is_causal else left


def is_arithmetic(problem: AttentionProblem) -> bool:
    """Whether what is visible follows from positions alone, and every query sees a key."""
    return problem.ranges is None and problem.query.shape[2] <= problem.key.shape[2]


def plan(problem: AttentionProblem) -> Plan:
    """The tables of a problem."""
    num_queries, num_keys = problem.query.shape[2], problem.key.shape[2]
    ranges = problem.ranges
    start = end = runs = None
    patterns = 1
    if ranges is not None:
        start, end = ranges.start.int().contiguous(), ranges.end.int().contiguous()
        patterns = start.shape[0]
    if (keys := shown_keys(problem)) is not None:
        runs = key_runs(keys)
        patterns = max(patterns, runs.shape[0])
    count = ceil_div(num_queries, ROWS)
    new = problem.query.new_empty
    rows = new(2, patterns, count * ROWS, dtype=torch.int32)
    tiles = new(patterns, count, FIELDS, dtype=torch.int32)
    left, right = reach(problem)
    launch(
        plan_kernel,
        (count, patterns),
        start,
        end,
        keys,
        runs,
        rows,
        tiles,
        *element_strides(start, 1),
        *element_strides(keys, 1),
        *element_strides(runs, 1),
        num_queries,
        num_keys,
        left,
        right,
        ROWS=ROWS,
        FIELDS=FIELDS,
        KEYS=KEYS,
        num_warps=1,
    )
    return Plan(rows, tiles, count)


def fill_empty(tables: Plan, out: Tensor, log_normalizer: Tensor) -> None:
    """Writes the rows of the tiles of queries that see nothing: 0, and −inf.

    Args:
        out: (B, H, Q, E), any strides but for the last.
        log_normalizer: (B, H, Q), contiguous.
    """
    batch, heads, num_queries, value_size = out.shape
    launch(
        empty_kernel,
        (batch * heads, tables.count),
        tables.tiles,
        out,
        log_normalizer,
        heads,
        num_queries,
        tables.patterns,
        out.stride(),
        VALUE_SIZE=value_size,
        ROWS=ROWS,
        FIELDS=FIELDS,
        num_warps=4,
    )
