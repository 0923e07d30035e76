"""dq: one program a tile of queries, looping over the keys it can see."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_rows
from .gradient import Prepared, drop, row_level, slope_factor, weight_and_slope
from .host import launch
from .tiles import (
    Rule,
    add_matmul,
    common_level,
    head_factor,
    is_idle,
    key_factors,
    matmul,
    program_place,
    row_bounds,
    store_rows,
    tile_span,
)


@triton.jit(do_not_specialize=["bundle"])
def backward_query_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    grad_tiles,
    log_normalizer,
    delta,
    steady,
    grad_query,
    rule: tl.constexpr,
    terms,
    sizes,
    bundle,
    scale,
    strides,
    KEY_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
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
    row = flat_head.to(tl.int64) * sizes.queries + query
    known = query < sizes.queries
    row_delta = tl.load(delta + row, mask=known, other=0.0)[:, None]
    level = row_delta
    if not rule.prescaled:
        total = tl.load(log_normalizer + row, mask=known, other=float("-inf"))
        level = row_level(rule, total, common_level(rule, terms, key_row, inverse))[:, None]

    query_tile = query_tiles.load([batch, head, tile * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_D)
    grad_tile = grad_tiles.load([batch, head, tile * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_E)
    query_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for offset in tl.range(first, last, BLOCK_N):
        key_tile = key_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        value_tile = value_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_E)
        product = matmul(query_tile, key_tile.T, rule)
        key = (offset + tl.arange(0, BLOCK_N))[None, :]
        partial = (offset < inner_start) | (offset + BLOCK_N > inner_end)
        _, slope = weight_and_slope(
            rule, terms, sizes, product, level, factor, inverse, batch, head, key_row,
            start[:, None], end[:, None], query[:, None], key, partial,
        )  # fmt: skip
        if rule.keyed and terms.key_factor is not None:
            slope = slope * key_factors(terms, sizes, key_row, key)
        grad_weight = matmul(grad_tile, value_tile.T, rule)
        grad_weight = drop(rule, terms, grad_weight, flat_head, query[:, None], key)
        grad_score = slope * (grad_weight - row_delta)
        query_sum = add_matmul(query_sum, grad_score.to(key_tile.dtype), key_tile, rule)
    query_sum = query_sum * slope_factor(rule, factor, inverse)
    store_rows(grad_query, strides, batch, head, query, sizes.queries, query_sum, KEY_SIZE, BLOCK_D)


def query_gradient(prepared: Prepared) -> Tensor:
    """Gradient of the query, in its shape and order in memory."""
    call = prepared.call
    grad_query = empty_rows(call.problem.query, call.key_size)
    for rule in call.rules():
        write_query_gradient(prepared, rule, grad_query)
    return grad_query


def write_query_gradient(prepared: Prepared, rule: Rule, grad_query: Tensor) -> None:
    """Launches the kernel with one of the call's rules: all heads, or those that it is for."""
    call = prepared.call
    problem, shape = call.problem, call.tile_shape("backward_query")
    launch(
        backward_query_kernel,
        call.query_grid(shape),
        *prepared.operands(shape),
        call.steady,
        grad_query,
        rule,
        call.terms,
        call.sizes,
        call.bundle(problem.key, problem.value),
        problem.scale,
        grad_query.stride(),
        KEY_SIZE=call.key_size,
        **call.blocks,
        **shape.options,
    )
