"""dk, dv and the gradient of the key bias: one program a tile of keys, looping over its queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_rows
from .gradient import Prepared, drop, row_level, slope_factor, weight_and_slope
from .host import launch
from .launch import ceil_div
from .tiles import (
    Rule,
    add_matmul,
    common_level,
    head_factor,
    is_idle,
    is_kept,
    key_factors,
    matmul,
    program_place,
    row_hash,
    store_rows,
)


@triton.jit
def static_tiles(terms, sizes, key_start, key_end, num_tiles, BLOCK_M: tl.constexpr):
    """Tiles of queries: [first, last) see some of the keys, [inner_first, inner_last) all of them."""
    diagonal = sizes.keys - sizes.queries
    first = 0
    last = num_tiles
    inner_first = 0
    inner_last = num_tiles
    if terms.right is not None:
        first = tl.maximum(key_start - diagonal - terms.right + 1, 0) // BLOCK_M
        inner_first = tl.cdiv(tl.maximum(key_end - diagonal - terms.right, 0), BLOCK_M)
    if terms.left is not None:
        end = tl.maximum(key_end - 1 - diagonal + terms.left, 0)
        last = tl.minimum(last, tl.cdiv(end, BLOCK_M))
        inner_last = tl.minimum(
            num_tiles, tl.maximum(key_start - diagonal + terms.left, 0) // BLOCK_M
        )
    return first, last, inner_first, inner_last


@triton.jit
def ranged_tiles(spans, key_start, key_end, num_tiles):
    """`static_tiles` where `KeyRanges` take part, from the spans of one sequence's tiles."""
    first = num_tiles
    last = 0
    inner_first = num_tiles
    inner_last = 0
    inner_count = 0
    for chunk in range(0, num_tiles, 128):
        tile = chunk + tl.arange(0, 128)
        known = tile < num_tiles
        start = tl.load(spans + tile * 4, mask=known, other=0)
        end = tl.load(spans + tile * 4 + 1, mask=known, other=0)
        inner_start = tl.load(spans + tile * 4 + 2, mask=known, other=0)
        inner_end = tl.load(spans + tile * 4 + 3, mask=known, other=0)
        touched = (start < key_end) & (end > key_start) & known
        inner = (inner_start <= key_start) & (inner_end >= key_end) & known
        first = tl.minimum(first, tl.min(tl.where(touched, tile, num_tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(touched, tile + 1, 0), 0))
        inner_first = tl.minimum(inner_first, tl.min(tl.where(inner, tile, num_tiles), 0))
        inner_last = tl.maximum(inner_last, tl.max(tl.where(inner, tile + 1, 0), 0))
        inner_count += tl.sum(inner.to(tl.int32), 0)
    # Tiles that see all keys need not be neighbours; then every tile takes the masked path.
    inner_last = tl.where(inner_count == inner_last - inner_first, inner_last, 0)
    return first, last, inner_first, inner_last


@triton.jit(do_not_specialize=["bundle", "num_tiles"])
def backward_key_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    grad_tiles,
    log_normalizer,
    delta,
    spans,
    steady,
    grad_key,
    grad_value,
    grad_key_bias,
    rule: tl.constexpr,
    terms,
    sizes,
    bundle,
    scale,
    num_tiles,
    key_strides,
    value_strides,
    GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Earlier tiles of a causal problem are seen by the most queries: they start first.
    key_row, tile = program_place(bundle, tl.cdiv(sizes.keys, BLOCK_N))
    key_start = tile * BLOCK_N
    # Keys past the last one are zero and never written, so that they need no mask.
    key_end = tl.minimum(key_start + BLOCK_N, sizes.keys)
    key_heads = sizes.heads // GROUP
    batch = key_row // key_heads
    key_head = key_row % key_heads
    key = key_start + tl.arange(0, BLOCK_N)
    column = key[:, None]
    if steady is not None:  # noqa: SIM102 - decided at compile time
        if is_idle(rule, steady, key_row):
            return
    if spans is not None:
        spans += (
            tl.where((terms.range_batch != 0) | (terms.runs_batch != 0), batch, 0).to(tl.int64)
            * num_tiles
            * 4
        )
        first, last, inner_first, inner_last = ranged_tiles(spans, key_start, key_end, num_tiles)
    else:
        first, last, inner_first, inner_last = static_tiles(
            terms, sizes, key_start, key_end, num_tiles, BLOCK_M
        )
    if terms.mask is not None:
        inner_last = 0
    count = tl.maximum(last - first, 0)

    inverse = 1.0
    if rule.folded:
        inverse = 1.0 / (scale * scale)
    common = common_level(rule, terms, key_row, inverse)
    key_tile = key_tiles.load([batch, key_head, key_start, 0]).reshape(BLOCK_N, BLOCK_D)
    value_tile = value_tiles.load([batch, key_head, key_start, 0]).reshape(BLOCK_N, BLOCK_E)
    key_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    bias_sum = tl.zeros((BLOCK_N,), tl.float32)
    for step in tl.range(0, GROUP * count):
        if GROUP == 1:
            head = key_head
            tile = first + step
        else:
            head = key_head * GROUP + step // count
            tile = first + step % count
        flat_head = batch * sizes.heads + head
        query_start = tile * BLOCK_M
        query_tile = query_tiles.load([batch, head, query_start, 0]).reshape(BLOCK_M, BLOCK_D)
        product = matmul(key_tile, query_tile.T, rule)

        query = query_start + tl.arange(0, BLOCK_M)
        row = flat_head.to(tl.int64) * sizes.queries + query
        known = query < sizes.queries
        row_delta = tl.load(delta + row, mask=known, other=0.0)[None, :]
        level = row_delta
        if not rule.prescaled:
            total = tl.load(log_normalizer + row, mask=known, other=float("-inf"))
            level = row_level(rule, total, common)[None, :]
        factor = head_factor(terms, scale, head)
        partial = (tile < inner_first) | (tile >= inner_last)
        weight, slope = weight_and_slope(
            rule, terms, sizes, product, level, factor, inverse, batch, head, key_row, None, None,
            query[None, :], column, partial,
        )  # fmt: skip
        grad_tile = grad_tiles.load([batch, head, query_start, 0]).reshape(BLOCK_M, BLOCK_E)
        kept = weight
        if rule.threshold > 0:
            hashed = row_hash(terms, flat_head, query[None, :])
            kept = tl.where(is_kept(hashed, column, rule), weight, 0.0)
        kept = kept.to(grad_tile.dtype)
        grad_weight = matmul(value_tile, grad_tile.T, rule)
        grad_weight = drop(rule, terms, grad_weight, flat_head, query[None, :], column)
        grad_score = slope * (grad_weight - row_delta)
        if terms.gain is not None:
            grad_score = grad_score * slope_factor(rule, factor, inverse)
        value_sum = add_matmul(value_sum, kept, grad_tile, rule)
        key_sum = add_matmul(key_sum, grad_score.to(query_tile.dtype), query_tile, rule)
        if grad_key_bias is not None:
            if rule.threshold > 0:
                bias_sum += tl.sum(weight * row_delta, 1)
            else:  # with the rounding of the weights in dv, so that the two parts cancel
                bias_sum += tl.sum(kept.to(tl.float32) * row_delta, 1)

    if rule.keyed and terms.key_factor is not None:
        key_factor = key_factors(terms, sizes, key_row, key)
        key_sum = key_sum * key_factor[:, None]
        value_sum = value_sum * key_factor[:, None]
        bias_sum = bias_sum * key_factor
    if terms.gain is None:
        key_sum = key_sum * slope_factor(rule, scale, inverse)
    value_sum = value_sum * terms.keep_scale
    store_rows(grad_key, key_strides, batch, key_head, key, sizes.keys, key_sum, KEY_SIZE, BLOCK_D)
    store_rows(
        grad_value, value_strides, batch, key_head, key, sizes.keys, value_sum, VALUE_SIZE, BLOCK_E
    )
    if grad_key_bias is not None:
        # Σ_i P_ij (kept_ij dout_i·v_j − δ_i), of which the first part is v_j·dv_j.
        # The values are loaded anew: as numbers, beside the tile that the products read in shared
        # memory, they would occupy registers throughout the loops.
        values = value_tiles.load([batch, key_head, key_start, 0]).reshape(BLOCK_N, BLOCK_E)
        bias_sum = tl.sum(values.to(tl.float32) * value_sum, 1) - bias_sum
        place = key_row.to(tl.int64) * sizes.keys + key
        tl.store(grad_key_bias + place, bias_sum, mask=key < sizes.keys)


def key_gradients(
    prepared: Prepared, *, need_key_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of key, value and, where needed, of the key bias, in their shapes; of the first two
    also in their order in memory."""
    call = prepared.call
    problem = call.problem
    grad_key = empty_rows(problem.key, call.key_size)
    grad_value = empty_rows(problem.value, call.value_size)
    grad_key_bias = None
    if need_key_bias:
        grad_key_bias = call.new(call.key_heads, call.num_keys, dtype=torch.float32)
    for rule in call.rules():
        write_key_gradients(prepared, rule, grad_key, grad_value, grad_key_bias)
    return grad_key, grad_value, grad_key_bias


def write_key_gradients(
    prepared: Prepared,
    rule: Rule,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_key_bias: Tensor | None,
) -> None:
    """Launches the kernel with one of the call's rules: all heads, or those that it is for."""
    call = prepared.call
    problem, shape = call.problem, call.tile_shape("backward_key")
    launch(
        backward_key_kernel,
        call.key_grid(shape),
        *prepared.operands(shape),
        prepared.spans,
        call.steady,
        grad_key,
        grad_value,
        grad_key_bias,
        rule,
        call.terms,
        call.sizes,
        call.bundle(problem.query, prepared.grad_out),
        problem.scale,
        ceil_div(call.num_queries, shape.block_m),
        grad_key.stride(),
        grad_value.stride(),
        GROUP=problem.group,
        KEY_SIZE=call.key_size,
        VALUE_SIZE=call.value_size,
        **call.blocks,
        **shape.options,
    )
