"""Decoding: few queries against many keys, the keys of one head split over several programs.

The query heads that share a key/value head are packed into the rows of one tile, so every key is read
once. Each split leaves an unnormalised sum; a second kernel adds them up. The number of splits follows
from shapes alone, the keys that a split takes from the bounds on the device: no host synchronisation,
and a static cache costs no more than what it holds.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import AttentionProblem
from .host import launch
from .launch import Call, ceil_div, num_processors, power_of_two
from .tiled_forward import absorb, finish, row_start
from .tiles import (
    common_level,
    exp,
    finite,
    head_factor,
    is_kept,
    matmul,
    row_bounds,
    row_hash,
    row_place,
    tile_span,
    weigh,
)

_MAX_SPLITS = 128
# Share of the multiprocessors at work in the last round that is not worth more splits.
_BUSY = 0.94


@triton.jit
def split_kernel(
    query,
    key_tiles,
    value_tiles,
    sums,
    totals,
    tops,
    out,
    log_normalizer,
    rule: tl.constexpr,
    terms,
    sizes,
    scale,
    query_batch,
    query_head,
    query_length,
    query_size,
    WHOLE: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    group = sizes.group
    num_queries = sizes.queries
    key_heads = sizes.heads // group
    batch = tl.program_id(0) // key_heads
    key_head = tl.program_id(0) % key_heads
    split = tl.program_id(1)
    # Rows past the last repeat it; they are never written.
    packed = tl.arange(0, BLOCK_M)
    written = packed < group * num_queries
    packed = tl.minimum(packed, group * num_queries - 1)
    head = key_head * group + packed // num_queries
    index = packed % num_queries
    flat_head = batch * sizes.heads + head
    column = index[:, None]

    factor = head_factor(terms, scale, head[:, None])
    inverse = 1.0
    if rule.folded:
        inverse = 1.0 / (factor * factor)
    start, end = row_bounds(terms, sizes, batch, index)
    first, last, inner_start, inner_end = tile_span(terms, batch, start, end, sizes.keys)
    share = tl.cdiv(tl.maximum(last - first, 0), tl.num_programs(1))
    share = tl.cdiv(share, BLOCK_N) * BLOCK_N
    first = first + split * share
    last = tl.minimum(last, first + share)

    size = tl.arange(0, BLOCK_D)
    place = row_place(batch, head, index, query_batch, query_head, query_length)
    query_tile = tl.load(
        query + place[:, None] + (size * query_size)[None, :],
        mask=(size < KEY_SIZE)[None, :],
        other=0.0,
    )
    accumulator = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total, top = row_start(rule, BLOCK_M)
    for offset in tl.range(first, last, BLOCK_N):
        key_tile = key_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        score = matmul(query_tile, key_tile.T, rule)
        key = (offset + tl.arange(0, BLOCK_N))[None, :]
        partial = (offset < inner_start) | (offset + BLOCK_N > inner_end)
        weight, accumulator, total, top = absorb(
            rule, terms, sizes, score, accumulator, total, top, factor, inverse, batch, head[:, None],
            tl.program_id(0), start[:, None], end[:, None], column, key, partial,
        )  # fmt: skip
        if rule.threshold > 0:
            hashed = row_hash(terms, flat_head[:, None], column)
            weight = tl.where(is_kept(hashed, key, rule), weight, 0.0)
        value_tile = value_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_E)
        accumulator = weigh(accumulator, weight, value_tile, rule)

    top += common_level(rule, terms, tl.program_id(0), inverse)
    row = flat_head.to(tl.int64) * num_queries + index
    size = tl.arange(0, BLOCK_E)
    inside = written[:, None] & (size < VALUE_SIZE)[None, :]
    if WHOLE:  # there is one split
        normalise, log_total = finish(terms, batch, head, index, total, top, num_queries)
        accumulator = accumulator * (normalise * (terms.keep_scale / rule.lift))[:, None]
        places = row[:, None] * VALUE_SIZE + size[None, :]
        tl.store(out + places, accumulator.to(out.dtype.element_ty), mask=inside)
        tl.store(log_normalizer + row, log_total, mask=written)
    else:
        # (splits, B, H, Q, E); a split without keys writes its zero total only.
        row += split * (tl.num_programs(0) * group).to(tl.int64) * num_queries
        tl.store(totals + row, total, mask=written)
        tl.store(tops + row, top, mask=written)
        places = row[:, None] * VALUE_SIZE + size[None, :]
        tl.store(sums + places, accumulator, mask=inside & (total > 0.0)[:, None])


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    sums,
    totals,
    tops,
    out,
    log_normalizer,
    rule: tl.constexpr,
    terms,
    sizes,
    splits,
    VALUE_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program a row (batch, head, query)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(0) % sizes.queries
    flat_head = tl.program_id(0) // sizes.queries
    split = tl.arange(0, BLOCK_S)
    place = split * tl.num_programs(0).to(tl.int64) + row
    total = tl.load(totals + place, mask=split < splits, other=0.0)
    level = tl.load(tops + place, mask=split < splits, other=float("-inf"))
    used = total > 0.0
    top = tl.max(tl.where(used, level, float("-inf")), 0)
    shrink = tl.where(used, exp(level - finite(top)), 0.0)
    size = tl.arange(0, BLOCK_E)
    inside = used[:, None] & (size < VALUE_SIZE)[None, :]
    part = tl.load(sums + place[:, None] * VALUE_SIZE + size[None, :], mask=inside, other=0.0)
    accumulator = tl.sum(part * shrink[:, None], 0)
    normalise, log_total = finish(
        terms,
        flat_head // sizes.heads,
        flat_head % sizes.heads,
        index,
        tl.sum(total * shrink, 0),
        top,
        sizes.queries,
    )
    accumulator = accumulator * (normalise * (terms.keep_scale / rule.lift))
    tl.store(
        out + row * VALUE_SIZE + size, accumulator.to(out.dtype.element_ty), mask=size < VALUE_SIZE
    )
    tl.store(log_normalizer + row, log_total)


@cache
def num_splits(rows: int, most: int, processors: int) -> int:
    """The fewest splits with which the last round of programs, one a processor, is nearly full.

    Args:
        rows: key/value heads of all sequences. most: splits allowed.
    """
    programs = [rows * splits for splits in range(1, most + 1)]
    busy = [count / (ceil_div(count, processors) * processors) for count in programs]
    return 1 + next((i for i, share in enumerate(busy) if share >= _BUSY), busy.index(max(busy)))


def decode(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """`ops.triton.forward` for few queries."""
    call = Call(problem, steady=False)
    shape = call.tile_shape("decode")
    # At least two tiles of keys each.
    most = min(ceil_div(call.num_keys, 2 * shape.block_n), _MAX_SPLITS)
    splits = num_splits(call.batch * call.key_heads, most, num_processors(problem))
    out = call.new(call.heads, call.num_queries, call.value_size, dtype=problem.query.dtype)
    log_normalizer = call.new(call.heads, call.num_queries, dtype=torch.float32)
    sums = totals = tops = None
    if splits > 1:
        rows = (splits, *log_normalizer.shape)
        sums = log_normalizer.new_empty(*rows, call.value_size)
        totals = log_normalizer.new_empty(rows)
        tops = log_normalizer.new_empty(rows)
    launch(
        split_kernel,
        (call.batch * call.key_heads, splits),
        problem.query,
        call.tiles(problem.key, shape.block_n),
        call.tiles(problem.value, shape.block_n),
        sums,
        totals,
        tops,
        out,
        log_normalizer,
        call.rule,
        call.terms,
        call.sizes,
        problem.scale,
        *problem.query.stride(),
        WHOLE=splits == 1,
        KEY_SIZE=call.key_size,
        VALUE_SIZE=call.value_size,
        **call.blocks,
        **shape.options,
    )
    if splits == 1:
        return out, log_normalizer
    launch(
        combine_kernel,
        (call.batch * call.heads * call.num_queries,),
        sums,
        totals,
        tops,
        out,
        log_normalizer,
        call.rule,
        call.terms,
        call.sizes,
        splits,
        VALUE_SIZE=call.value_size,
        BLOCK_S=power_of_two(splits, least=1),
        BLOCK_E=call.blocks["BLOCK_E"],
    )
    return out, log_normalizer
