"""The forward kernel: one program a tile of queries of one head, looping over the keys it can see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import AttentionProblem
from .launch import Call, tile_shape
from .tiles import (
    LN_2,
    TINY,
    exp,
    finite,
    head_factor,
    is_kept,
    is_visible,
    log_weight,
    matmul,
    plain_weight,
    response,
    row_bounds,
    row_hash,
    row_place,
    score_of,
    weigh,
)

# Rows count weights as far as e^-60 below the highest: 34 decades under the largest, normal in float32.
_STEADY = tl.constexpr(60.0)


@triton.jit
def absorb(
    rule,
    terms,
    score,
    accumulator,
    total,
    top,
    factor,
    inverse,
    batch,
    head,
    key_row,
    query,
    key,
    num_queries,
    num_keys,
    partial,
):
    """The weights of a tile from q·k, and the running sums with those weights counted in.

    Returns:
        weight: the tile's weights times exp(−top).
        accumulator, total: rescaled to the new `top`; `total` includes the tile, `accumulator` not.
        top: running maximum of the additive log-weights of each row.
    """
    score = score_of(rule, terms, score, factor)
    if rule.shifted:
        additive = log_weight(
            rule, terms, score, inverse, batch, head, key_row, query, key, num_queries, num_keys
        )
    if rule.keyed:
        weight = response(score, inverse, rule)
        if partial:
            visible = is_visible(terms, batch, head, query, key, num_queries, num_keys)
            # The weight, always ≥ 0, is named here only to keep the tile in the layout of products.
            shown = tl.where(visible & (weight >= 0.0), additive, float("-inf"))
            raised = tl.maximum(top, tl.max(shown, 1))
            weight = weight * exp(shown - finite(raised)[:, None])
        else:  # exponentials of single keys and single rows
            peak = tl.max(additive, 1)
            raised = tl.maximum(top, peak)
            boost = exp(additive - finite(peak)[:, None])
            weight = weight * boost * exp(peak - finite(raised))[:, None]
    else:
        if partial:
            visible = is_visible(terms, batch, head, query, key, num_queries, num_keys)
            if rule.shifted:
                additive = tl.where(visible, additive, float("-inf"))
            else:  # a Hill response is 0 at score 0
                score = tl.where(visible, score, 0.0)
        if rule.plain:  # noqa: SIM108
            weight = plain_weight(score, inverse, rule)
        else:
            weight = response(score, inverse, rule)
        if rule.shifted:
            raised = tl.maximum(top, tl.max(additive, 1))
            weight = weight * exp(additive - finite(raised)[:, None])
    if rule.shifted:
        shrink = exp(top - finite(raised))
        accumulator = accumulator * shrink[:, None]
        total = total * shrink
        top = raised
    return weight, accumulator, total + tl.sum(weight, 1), top


@triton.jit
def finish(terms, batch, head, query, total, top, num_queries):
    """(factor that normalises the accumulator, log normaliser) from Σ w · exp(−top) and top.

    The sink joins here; a row that saw nothing gets (0, −inf).
    """
    if terms.sinks is not None:
        place = row_place(
            batch, head, query, terms.sinks_batch, terms.sinks_head, terms.sinks_query
        )
        sink = tl.load(terms.sinks + place, mask=query < num_queries, other=float("-inf"))
        sink = sink.to(tl.float32)
        above = finite(tl.maximum(top, sink))
        shrink = exp(top - above)
        total = total * shrink + exp(sink - above)
    else:
        above = finite(top)
        shrink = tl.where(top == float("-inf"), 0.0, 1.0)
    seen = total >= TINY
    total = tl.where(seen, total, 1.0)
    factor = tl.where(seen, shrink / total, 0.0)
    return factor, tl.where(seen, tl.log2(total) * LN_2 + above, float("-inf"))


@triton.jit
def absorb_steadily(
    rule,
    terms,
    score,
    total,
    shift,
    factor,
    inverse,
    batch,
    head,
    key_row,
    query,
    key,
    num_queries,
    num_keys,
    partial,
):
    """`absorb` where log-weights depend on the key alone and `shift` is near every row's top."""
    score = score_of(rule, terms, score, factor)
    additive = log_weight(
        rule, terms, score, inverse, batch, head, key_row, query, key, num_queries, num_keys
    )
    weight = response(score, inverse, rule) * exp(additive - shift)
    if partial:
        visible = is_visible(terms, batch, head, query, key, num_queries, num_keys)
        weight = tl.where(visible, weight, 0.0)
    return weight, total + tl.sum(weight, 1)


@triton.jit
def steady_shift(rule, peaks, inverse, first, last, inner_start, inner_end, BLOCK_N: tl.constexpr):
    """(the highest log-weight of the keys first to last, whether it is near every row's own maximum).

    Every row sees the inner keys, so that its own maximum is at least theirs.
    """
    outer = first * 0.0 - float("inf")
    inner = outer
    for chunk in range(first // BLOCK_N, tl.cdiv(last, BLOCK_N), 256):
        tile = chunk + tl.arange(0, 256)
        start = tile * BLOCK_N
        peak = tl.load(peaks + tile, mask=start < last, other=float("-inf"))
        outer = tl.maximum(outer, tl.max(peak, 0))
        peak = tl.where(
            (start >= inner_start) & (start + BLOCK_N <= inner_end), peak, float("-inf")
        )
        inner = tl.maximum(inner, tl.max(peak, 0))
    if rule.folded:
        outer -= tl.log2(inverse) * LN_2
        inner -= tl.log2(inverse) * LN_2
    return outer, outer - inner < _STEADY


@triton.jit
def walk(
    query_tile,
    key_tiles,
    value_tiles,
    accumulator,
    total,
    top,
    shift,
    rule,
    terms,
    factor,
    inverse,
    flat_head,
    heads,
    group,
    query,
    first,
    last,
    inner_start,
    inner_end,
    num_queries,
    num_keys,
    STEADY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Counts in the keys first to last: (Σ w·v, Σ w, top), both sums times exp(−top)."""
    batch = flat_head // heads
    head = flat_head % heads
    key_head = head // group
    key_row = flat_head // group
    if rule.threshold > 0:
        hashed = row_hash(terms, flat_head, query)
    # One loop, with the mask behind a branch: two loops would fill the load pipeline twice.
    for offset in tl.range(first, last, BLOCK_N):
        key_tile = key_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        score = matmul(query_tile, key_tile.T, rule)
        key = (offset + tl.arange(0, BLOCK_N))[None, :]
        partial = (offset < inner_start) | (offset + BLOCK_N > inner_end) | rule.masked
        if STEADY:
            weight, total = absorb_steadily(
                rule, terms, score, total, shift, factor, inverse, batch, head, key_row,
                query, key, num_queries, num_keys, partial,
            )  # fmt: skip
        else:
            weight, accumulator, total, top = absorb(
                rule, terms, score, accumulator, total, top, factor, inverse, batch, head, key_row,
                query, key, num_queries, num_keys, partial,
            )  # fmt: skip
        if rule.threshold > 0:
            weight = tl.where(is_kept(hashed, key, rule), weight, 0.0)
        value_tile = value_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_E)
        accumulator = weigh(accumulator, weight, value_tile, rule)
    if STEADY:
        top = tl.zeros_like(total) + shift
    return accumulator, total, top


@triton.jit
def row_start(rule, BLOCK_M: tl.constexpr):
    """`total` and `top` before the first key."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    if rule.shifted:
        return total, total - float("inf")
    else:
        return total, total


@triton.jit
def forward_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    peaks,
    out,
    log_normalizer,
    rule,
    terms,
    scale,
    heads,
    group,
    num_queries,
    num_keys,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Later tiles of a causal problem are the longest: they start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)

    factor = head_factor(terms, scale, head)
    inverse = 1.0
    if rule.folded:
        inverse = 1.0 / (factor * factor)
    start, end = row_bounds(terms, batch, query, num_queries, num_keys)
    first = tl.min(tl.where(start < end, start, num_keys), 0) // BLOCK_N * BLOCK_N
    last = tl.max(tl.where(start < end, end, 0), 0)
    inner_start = tl.max(start, 0)
    inner_end = tl.min(end, 0)

    query_tile = query_tiles.load([batch, head, tile * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_D)
    accumulator = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total, top = row_start(rule, BLOCK_M)

    if peaks is not None:
        peaks += (tl.program_id(0) // group).to(tl.int64) * tl.cdiv(num_keys, BLOCK_N)
        shift, steady = steady_shift(
            rule, peaks, inverse, first, last, inner_start, inner_end, BLOCK_N
        )
        if steady:
            accumulator, total, top = walk(
                query_tile, key_tiles, value_tiles, accumulator, total, top, shift, rule, terms, factor,
                inverse, tl.program_id(0), heads, group, query[:, None], first, last, inner_start,
                inner_end, num_queries, num_keys, True, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
        else:
            accumulator, total, top = walk(
                query_tile, key_tiles, value_tiles, accumulator, total, top, shift, rule, terms, factor,
                inverse, tl.program_id(0), heads, group, query[:, None], first, last, inner_start,
                inner_end, num_queries, num_keys, False, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
    else:
        accumulator, total, top = walk(
            query_tile, key_tiles, value_tiles, accumulator, total, top, 0.0, rule, terms, factor,
            inverse, tl.program_id(0), heads, group, query[:, None], first, last, inner_start,
            inner_end, num_queries, num_keys, False, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip

    normalise, log_total = finish(terms, batch, head, query, total, top, num_queries)
    accumulator = accumulator * (normalise * (terms.keep_scale / rule.lift))[:, None]
    row = tl.program_id(0).to(tl.int64) * num_queries + query
    inside = query < num_queries
    size = tl.arange(0, BLOCK_E)
    tl.store(
        out + row[:, None] * VALUE_SIZE + size[None, :],
        accumulator.to(out.dtype.element_ty),
        mask=inside[:, None] & (size < VALUE_SIZE)[None, :],
    )
    tl.store(log_normalizer + row, log_total, mask=inside)


def _peaks(call: Call, block_n: int) -> Tensor | None:
    """The highest key bias of each tile, (B · K, tiles), where rows may share a maximum."""
    key_bias = call.terms.key_bias
    if key_bias is None or not call.rule.keyed.value or call.rule.masked.value:
        return None
    rest = -call.num_keys % block_n
    padded = torch.nn.functional.pad(key_bias.flatten(0, 1), (0, rest), value=-torch.inf)
    return padded.unflatten(1, (-1, block_n)).amax(-1)


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """`ops.triton.forward` for any number of queries.

    Returns:
        out: (B, H, Q, E) in the dtype of the query, contiguous.
        log_normalizer: (B, H, Q), float32, −inf for a row that sees nothing.
    """
    call = Call(problem)
    out = call.new(call.heads, call.num_queries, call.value_size, dtype=problem.query.dtype)
    log_normalizer = call.new(call.heads, call.num_queries, dtype=torch.float32)
    shape = tile_shape("forward", call)
    grid = (call.batch * call.heads, triton.cdiv(call.num_queries, shape.block_m))
    forward_kernel[grid](
        call.tiles(problem.query, shape.block_m),
        call.tiles(problem.key, shape.block_n),
        call.tiles(problem.value, shape.block_n),
        _peaks(call, shape.block_n),
        out,
        log_normalizer,
        call.rule,
        call.terms,
        problem.scale,
        call.heads,
        problem.group,
        call.num_queries,
        call.num_keys,
        VALUE_SIZE=call.value_size,
        BLOCK_D=call.block_d,
        BLOCK_E=call.block_e,
        **shape.options,
    )
    return out, log_normalizer
