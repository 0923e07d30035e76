"""The forward kernel: one program a tile of queries of one head, looping over the keys it can see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_rows
from ..problem import AttentionProblem
from .host import launch
from .launch import Call
from .tiles import (
    LN_2,
    TINY,
    Rule,
    common_level,
    exp,
    finite,
    head_factor,
    is_idle,
    is_kept,
    is_visible,
    key_factors,
    log_weight,
    matmul,
    plain_weight,
    program_place,
    response,
    row_bounds,
    row_hash,
    row_place,
    score_of,
    store_rows,
    tile_span,
    weigh,
)


@triton.jit
def absorb(
    rule,
    terms,
    sizes,
    score,
    accumulator,
    total,
    top,
    factor,
    inverse,
    batch,
    head,
    key_row,
    start,
    end,
    query,
    key,
    partial,
):
    """The weights of a tile from q·k, and the running sums with those weights counted in.

    Returns:
        weight: the tile's weights times exp(−top).
        accumulator, total: rescaled to the new `top`; `total` includes the tile, `accumulator` not.
        top: with `rule.shifted`, running maximum of the additive log-weights of each row.
    """
    score = score_of(rule, terms, score, factor)
    if rule.shifted:
        additive = log_weight(rule, terms, sizes, score, batch, head, key_row, query, key)
        # Naming the score keeps the tile in the layout of products.
        additive = tl.where(score == score, additive, 0.0)
        if partial:
            visible = is_visible(terms, sizes, batch, head, start, end, query, key)
            additive = tl.where(visible, additive, float("-inf"))
        raised = tl.maximum(top, tl.max(additive, 1))
        weight = response(score, inverse, rule) * exp(additive - finite(raised)[:, None])
        shrink = exp(top - finite(raised))
        accumulator = accumulator * shrink[:, None]
        total = total * shrink
        top = raised
    elif rule.keyed:
        weight = response(score, inverse, rule)
        if terms.key_factor is not None:
            weight = weight * key_factors(terms, sizes, key_row, key)
        if partial:
            visible = is_visible(terms, sizes, batch, head, start, end, query, key)
            weight = tl.where(visible, weight, 0.0)
    else:
        if partial:  # a Hill response is 0 at score 0
            visible = is_visible(terms, sizes, batch, head, start, end, query, key)
            score = tl.where(visible, score, 0.0)
        if rule.plain:  # noqa: SIM108
            weight = plain_weight(score, inverse, rule)
        else:
            weight = response(score, inverse, rule)
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
def row_start(rule, BLOCK_M: tl.constexpr):
    """`total` and `top` before the first key."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    if rule.shifted:
        return total, total - float("inf")
    else:
        return total, total


@triton.jit(do_not_specialize=["bundle"])
def forward_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    steady,
    out,
    log_normalizer,
    rule: tl.constexpr,
    terms,
    sizes,
    bundle,
    scale,
    strides,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Later tiles of a causal problem are the longest: they start first.
    tiles = tl.cdiv(sizes.queries, BLOCK_M)
    flat_head, tile = program_place(bundle, tiles)
    tile = tiles - 1 - tile
    batch = flat_head // sizes.heads
    head = flat_head % sizes.heads
    key_head = head // sizes.group
    key_row = flat_head // sizes.group
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if steady is not None:  # noqa: SIM102 - decided at compile time
        if is_idle(rule, steady, key_row):
            return

    factor = head_factor(terms, scale, head)
    inverse = 1.0
    if rule.folded:
        inverse = 1.0 / (factor * factor)
    start, end = row_bounds(terms, sizes, batch, query)
    first, last, inner_start, inner_end = tile_span(terms, batch, start, end, sizes.keys)
    first = first // BLOCK_N * BLOCK_N
    if rule.threshold > 0:
        hashed = row_hash(terms, flat_head, query[:, None])
    query_tile = query_tiles.load([batch, head, tile * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_D)
    accumulator = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total, top = row_start(rule, BLOCK_M)

    # One loop, with the mask behind a branch: two loops would fill the load pipeline twice.
    for offset in tl.range(first, last, BLOCK_N):
        key_tile = key_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        score = matmul(query_tile, key_tile.T, rule)
        key = (offset + tl.arange(0, BLOCK_N))[None, :]
        partial = (offset < inner_start) | (offset + BLOCK_N > inner_end)
        weight, accumulator, total, top = absorb(
            rule, terms, sizes, score, accumulator, total, top, factor, inverse, batch, head,
            key_row, start[:, None], end[:, None], query[:, None], key, partial,
        )  # fmt: skip
        if rule.threshold > 0:
            weight = tl.where(is_kept(hashed, key, rule), weight, 0.0)
        value_tile = value_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_E)
        accumulator = weigh(accumulator, weight, value_tile, rule)

    top += common_level(rule, terms, key_row, inverse)
    normalise, log_total = finish(terms, batch, head, query, total, top, sizes.queries)
    accumulator = accumulator * (normalise * (terms.keep_scale / rule.lift))[:, None]
    row = flat_head.to(tl.int64) * sizes.queries + query
    store_rows(out, strides, batch, head, query, sizes.queries, accumulator, VALUE_SIZE, BLOCK_E)
    tl.store(log_normalizer + row, log_total, mask=query < sizes.queries)


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """`ops.triton.forward` for any number of queries.

    Returns:
        out: (B, H, Q, E), dtype and order in memory those of the query.
        log_normalizer: (B, H, Q), float32, −inf for a row that sees nothing.
    """
    call = Call(problem)
    out = empty_rows(problem.query, call.value_size)
    log_normalizer = call.new(call.heads, call.num_queries, dtype=torch.float32)
    for rule in call.rules():
        compute(call, rule, out, log_normalizer)
    return out, log_normalizer


def compute(call: Call, rule: Rule, out: Tensor, log_normalizer: Tensor) -> None:
    """Launches the kernel with one of the call's rules: all heads, or those that it is for.

    Args:
        out: (B, H, Q, E), any strides but for the last. log_normalizer: (B, H, Q), contiguous.
    """
    problem, shape = call.problem, call.tile_shape("forward")
    launch(
        forward_kernel,
        call.query_grid(shape),
        call.tiles(problem.query, shape.block_m),
        call.tiles(problem.key, shape.block_n),
        call.tiles(problem.value, shape.block_n),
        call.steady,
        out,
        log_normalizer,
        rule,
        call.terms,
        call.sizes,
        call.bundle(problem.key, problem.value),
        problem.scale,
        out.stride(),
        VALUE_SIZE=call.value_size,
        **call.blocks,
        **shape.options,
    )
