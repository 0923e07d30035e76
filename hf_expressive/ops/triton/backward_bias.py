"""The gradient of an additive bias: one program a tile of the bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient import Prepared, drop, row_level, weight_and_slope
from .host import launch
from .launch import ceil_div
from .tiles import common_level, head_factor, matmul, row_bounds


@triton.jit
def backward_bias_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    grad_tiles,
    log_normalizer,
    delta,
    grad_bias,
    rule: tl.constexpr,
    terms,
    sizes,
    scale,
    sum_batches,
    sum_heads,
    sum_query_tiles,
    sum_key_tiles,
    bias_heads,
    bias_queries,
    bias_keys,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """It sums over whatever the bias broadcasts to."""
    bias_batch = tl.program_id(0) // bias_heads
    bias_head = tl.program_id(0) % bias_heads
    total_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(sum_batches * sum_heads * sum_query_tiles * sum_key_tiles):
        key_start = (tl.program_id(2) + step % sum_key_tiles) * BLOCK_N
        rest = step // sum_key_tiles
        query_start = (tl.program_id(1) + rest % sum_query_tiles) * BLOCK_M
        rest = rest // sum_query_tiles
        head = bias_head + rest % sum_heads
        batch = bias_batch + rest // sum_heads
        flat_head = batch * sizes.heads + head
        key_head = head // sizes.group
        query = query_start + tl.arange(0, BLOCK_M)
        key = (key_start + tl.arange(0, BLOCK_N))[None, :]
        start, end = row_bounds(terms, sizes, batch, query)
        row = flat_head.to(tl.int64) * sizes.queries + query
        known = query < sizes.queries
        row_delta = tl.load(delta + row, mask=known, other=0.0)[:, None]
        factor = head_factor(terms, scale, head)
        inverse = 1.0
        if rule.folded:
            inverse = 1.0 / (factor * factor)
        total = tl.load(log_normalizer + row, mask=known, other=float("-inf"))
        level = row_level(
            rule, total, common_level(rule, terms, flat_head // sizes.group, inverse)
        )[:, None]
        query_tile = query_tiles.load([batch, head, query_start, 0]).reshape(BLOCK_M, BLOCK_D)
        key_tile = key_tiles.load([batch, key_head, key_start, 0]).reshape(BLOCK_N, BLOCK_D)
        product = matmul(query_tile, key_tile.T, rule)
        grad_tile = grad_tiles.load([batch, head, query_start, 0]).reshape(BLOCK_M, BLOCK_E)
        value_tile = value_tiles.load([batch, key_head, key_start, 0]).reshape(BLOCK_N, BLOCK_E)
        grad_weight = matmul(grad_tile, value_tile.T, rule)
        query = query[:, None]
        weight, _ = weight_and_slope(
            rule, terms, sizes, product, level, factor, inverse, batch, head,
            flat_head // sizes.group, start[:, None], end[:, None], query, key, True,
        )  # fmt: skip
        grad_weight = drop(rule, terms, grad_weight, flat_head, query, key)
        total_sum += weight * (grad_weight - row_delta)
    key = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    if bias_queries == 1:
        total_sum = tl.broadcast_to(tl.sum(total_sum, 0)[None, :], (BLOCK_M, BLOCK_N))
    if bias_keys == 1:
        total_sum = tl.broadcast_to(tl.sum(total_sum, 1)[:, None], (BLOCK_M, BLOCK_N))
    place = (tl.program_id(0).to(tl.int64) * bias_queries + query) * bias_keys + key
    tl.store(grad_bias + place, total_sum, mask=(query < bias_queries) & (key < bias_keys))


def bias_gradient(prepared: Prepared) -> Tensor:
    """Gradient of the bias, in its shape and dtype."""
    call = prepared.call
    problem = call.problem
    assert problem.bias is not None
    shape = call.tile_shape("backward_bias")
    grad_bias = torch.empty(problem.bias.shape, dtype=torch.float32, device=problem.query.device)
    bias_batch, bias_heads, bias_queries, bias_keys = problem.bias.shape
    query_tiles = ceil_div(call.num_queries, shape.block_m)
    key_tiles = ceil_div(call.num_keys, shape.block_n)
    sum_query_tiles = query_tiles if bias_queries == 1 else 1
    sum_key_tiles = key_tiles if bias_keys == 1 else 1
    grid = (bias_batch * bias_heads, query_tiles // sum_query_tiles, key_tiles // sum_key_tiles)
    launch(
        backward_bias_kernel,
        grid,
        *prepared.operands(shape),
        grad_bias,
        call.rule,
        call.terms,
        call.sizes,
        problem.scale,
        call.batch // bias_batch,
        call.heads // bias_heads,
        sum_query_tiles,
        sum_key_tiles,
        bias_heads,
        bias_queries,
        bias_keys,
        **call.blocks,
        **shape.options,
    )
    return grad_bias.to(problem.bias.dtype)
