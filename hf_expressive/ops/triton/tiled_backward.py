"""The backward kernels, deterministic: one for dk and dv, one for dq, one for the gradient of a bias.

With P the normalised weights, kept those that dropout keeps (divided by 1 − p, else 0),
δ_i = dout_i·out_i and e = exp(additive − log_normalizer):

    d(log-weight)_ij = P_ij (kept_ij dout_i·v_j − δ_i)
    dz_ij            = e_ij g'(z_ij) (kept_ij dout_i·v_j − δ_i)
    dv_j = Σ_i kept_ij P_ij dout_i      dq_i = factor Σ_j dz_ij k_j      dk_j = factor Σ_i dz_ij q_i

A row that sees nothing has δ = 0 and e = 0. On the plain path e is the same for a whole row, so the
row of dout and δ are multiplied by it once (`prescaled`), and the tiles never see it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import AttentionProblem
from .launch import Call, tile_shape
from .tiles import (
    add_matmul,
    exp,
    finite,
    head_factor,
    is_kept,
    is_visible,
    log_weight,
    matmul,
    plain_weight_and_slope,
    response_and_slope,
    row_bounds,
    row_hash,
    score_of,
)


@triton.jit
def prepare_kernel(
    out,
    grad_out,
    log_normalizer,
    delta,
    scaled,
    heads,
    num_queries,
    grad_batch,
    grad_head,
    grad_query,
    grad_size,
    VALUE_SIZE: tl.constexpr,
    PRESCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """δ; with PRESCALED δ·e and dout·e, e = exp(−log_normalizer)."""
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    size = tl.arange(0, BLOCK_E)
    inside = (query < num_queries)[:, None] & (size < VALUE_SIZE)[None, :]
    row = tl.program_id(0).to(tl.int64) * num_queries + query
    place = batch.to(tl.int64) * grad_batch + head.to(tl.int64) * grad_head
    place = place + query[:, None].to(tl.int64) * grad_query + size[None, :] * grad_size
    gradient = tl.load(grad_out + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(out + row[:, None] * VALUE_SIZE + size[None, :], mask=inside, other=0.0)
    product = tl.sum(gradient * value.to(tl.float32), 1)
    if PRESCALED:
        total = tl.load(log_normalizer + row, mask=query < num_queries, other=0.0)
        inverse = tl.where(total == float("-inf"), 0.0, exp(-total))
        product = product * inverse
        gradient = gradient * inverse[:, None]
        tl.store(
            scaled + row[:, None] * VALUE_SIZE + size[None, :],
            gradient.to(scaled.dtype.element_ty),
            mask=inside,
        )
    tl.store(delta + row, product, mask=query < num_queries)


@triton.jit
def row_level(rule, total):
    """What e takes of the normaliser: its logarithm if weights are shifted, else its inverse."""
    empty = total == float("-inf")
    if rule.shifted:
        return tl.where(empty, float("inf"), total)
    else:
        return tl.where(empty, 0.0, exp(-total))


@triton.jit
def weight_and_slope(
    rule,
    terms,
    product,
    level,
    factor,
    inverse,
    flat_head,
    heads,
    group,
    query,
    key,
    num_queries,
    num_keys,
    partial,
    PRESCALED: tl.constexpr,
):
    """(normalised weights, e g'(z) without `slope_factor`) of a tile from q·k.

    `level` is that of `row_level`; with `PRESCALED` it is not read and nothing is normalised.
    flat_head = batch · H + head.
    """
    batch = flat_head // heads
    head = flat_head % heads
    score = score_of(rule, terms, product, factor)
    if rule.shifted:
        additive = log_weight(
            rule, terms, score, inverse, batch, head, flat_head // group, query, key,
            num_queries, num_keys,
        )  # fmt: skip
    if rule.keyed:
        if partial:
            visible = is_visible(terms, batch, head, query, key, num_queries, num_keys)
            # Naming the score keeps the tile in the layout of products.
            shown = tl.where(visible & (score == score), additive, float("-inf"))
            boost = exp(shown - level)
        else:  # exponentials of single keys and single rows
            peak = finite(tl.max(additive))
            boost = exp(additive - peak) * exp(peak - level)
    elif partial:
        visible = is_visible(terms, batch, head, query, key, num_queries, num_keys)
        if rule.shifted:
            additive = tl.where(visible, additive, float("-inf"))
        else:  # a Hill response and its slope are 0 at score 0
            score = tl.where(visible, score, 0.0)
    if rule.plain:
        weight, slope = plain_weight_and_slope(score, inverse, rule)
    else:
        weight, slope = response_and_slope(score, inverse, rule)
        if terms.cap is not None:
            ratio = score / terms.cap
            slope = slope * (1.0 - ratio * ratio)
    if rule.keyed:
        weight = weight * boost
        slope = slope * boost
    elif rule.shifted:
        boost = exp(additive - level)
        weight = weight * boost
        slope = slope * boost
    elif not PRESCALED:
        weight = weight * level
        slope = slope * level
    return weight, slope


@triton.jit
def keep(rule, terms, weight, grad_weight, flat_head, query, key):
    """Dropout of the weights, without its factor, and of their gradient, with it."""
    if rule.threshold > 0:
        kept = is_kept(row_hash(terms, flat_head, query), key, rule)
        return tl.where(kept, weight, 0.0), tl.where(kept, grad_weight * terms.keep_scale, 0.0)
    else:
        return weight, grad_weight


@triton.jit
def slope_factor(rule, factor, inverse):
    """The constant that `gradient_tile` leaves out of dz."""
    if rule.folded and rule.plain:
        return 2.0 * inverse
    elif rule.folded:
        return 1.0
    elif rule.plain:
        return 2.0 * factor
    else:
        return factor


@triton.jit
def store_rows(pointer, flat_head, row, length, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a tile into rows of a contiguous (B, heads, length, SIZE) tensor."""
    size = tl.arange(0, BLOCK)
    place = (flat_head.to(tl.int64) * length + row)[:, None] * SIZE + size[None, :]
    inside = (row < length)[:, None] & (size < SIZE)[None, :]
    tl.store(pointer + place, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tiles"])
def backward_key_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    grad_tiles,
    log_normalizer,
    delta,
    bounds,
    grad_key,
    grad_value,
    grad_key_bias,
    rule,
    terms,
    scale,
    heads,
    num_queries,
    num_keys,
    num_tiles,
    GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PRESCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Earlier tiles of a causal problem are seen by the most queries: they start first.
    key_start = tl.program_id(1) * BLOCK_N
    key_end = key_start + BLOCK_N
    key_heads = heads // GROUP
    batch = tl.program_id(0) // key_heads
    key_head = tl.program_id(0) % key_heads
    diagonal = num_keys - num_queries
    key = key_start + tl.arange(0, BLOCK_N)

    # The tiles of queries, first to last, that see any of these keys.
    if terms.start is not None:
        if terms.range_batch != 0:
            bounds += batch.to(tl.int64) * num_tiles * 4
        first = num_tiles
        last = 0
        for chunk in range(0, num_tiles, 128):
            tile = chunk + tl.arange(0, 128)
            known = tile < num_tiles
            start = tl.load(bounds + tile * 4, mask=known, other=0)
            end = tl.load(bounds + tile * 4 + 1, mask=known, other=0)
            touched = (start < key_end) & (end > key_start) & known
            first = tl.minimum(first, tl.min(tl.where(touched, tile, num_tiles), 0))
            last = tl.maximum(last, tl.max(tl.where(touched, tile + 1, 0), 0))
    else:
        first = 0
        last = num_tiles
        if terms.right is not None:
            first = tl.maximum(key_start - diagonal - terms.right + 1, 0) // BLOCK_M
        if terms.left is not None:
            end = tl.maximum(key_end - 1 - diagonal + terms.left, 0)
            last = tl.minimum(last, (end + BLOCK_M - 1) // BLOCK_M)
    count = tl.maximum(last - first, 0)

    inverse = 1.0
    if rule.folded:
        inverse = 1.0 / (scale * scale)
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
        flat_head = batch * heads + head
        query_start = tile * BLOCK_M
        query_tile = query_tiles.load([batch, head, query_start, 0]).reshape(BLOCK_M, BLOCK_D)
        product = matmul(key_tile, query_tile.T, rule)

        query = query_start + tl.arange(0, BLOCK_M)
        row = flat_head.to(tl.int64) * num_queries + query
        known = query < num_queries
        row_delta = tl.load(delta + row, mask=known, other=0.0)[None, :]
        if PRESCALED:
            level = row_delta
        else:
            total = tl.load(log_normalizer + row, mask=known, other=float("-inf"))
            level = row_level(rule, total)[None, :]
        factor = head_factor(terms, scale, head)
        partial = (key_end > num_keys) | rule.masked
        if terms.start is not None:
            partial = partial | (tl.load(bounds + tile * 4 + 2) > key_start)
            partial = partial | (tl.load(bounds + tile * 4 + 3) < key_end)
        else:
            if terms.right is not None:
                partial = partial | (query_start + diagonal + terms.right < key_end)
            if terms.left is not None:
                query_end = tl.minimum(query_start + BLOCK_M, num_queries)
                partial = partial | (query_end + diagonal - terms.left > key_start)

        column, row = key[:, None], query[None, :]
        weight, slope = weight_and_slope(
            rule, terms, product, level, factor, inverse, flat_head, heads, GROUP, row, column,
            num_queries, num_keys, partial, PRESCALED,
        )  # fmt: skip
        grad_tile = grad_tiles.load([batch, head, query_start, 0]).reshape(BLOCK_M, BLOCK_E)
        grad_weight = matmul(value_tile, grad_tile.T, rule)
        kept, grad_weight = keep(rule, terms, weight, grad_weight, flat_head, row, column)
        grad_weight = grad_weight - row_delta
        grad_score = slope * grad_weight
        if terms.gain is not None:
            grad_score = grad_score * slope_factor(rule, factor, inverse)
        value_sum = add_matmul(value_sum, kept.to(grad_tile.dtype), grad_tile, rule)
        key_sum = add_matmul(key_sum, grad_score.to(query_tile.dtype), query_tile, rule)
        if grad_key_bias is not None:
            bias_sum += tl.sum(weight * grad_weight, 1)

    if terms.gain is None:
        key_sum = key_sum * slope_factor(rule, scale, inverse)
    value_sum = value_sum * terms.keep_scale
    store_rows(grad_key, tl.program_id(0), key, num_keys, key_sum, KEY_SIZE, BLOCK_D)
    store_rows(grad_value, tl.program_id(0), key, num_keys, value_sum, VALUE_SIZE, BLOCK_E)
    if grad_key_bias is not None:
        place = tl.program_id(0).to(tl.int64) * num_keys + key
        tl.store(grad_key_bias + place, bias_sum, mask=key < num_keys)


@triton.jit
def backward_query_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    grad_tiles,
    log_normalizer,
    delta,
    grad_query,
    rule,
    terms,
    scale,
    heads,
    group,
    num_queries,
    num_keys,
    KEY_SIZE: tl.constexpr,
    PRESCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    flat_head = tl.program_id(0)
    batch = flat_head // heads
    head = flat_head % heads
    key_head = head // group
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
    row = flat_head.to(tl.int64) * num_queries + query
    known = query < num_queries
    row_delta = tl.load(delta + row, mask=known, other=0.0)[:, None]
    if PRESCALED:
        level = row_delta
    else:
        total = tl.load(log_normalizer + row, mask=known, other=float("-inf"))
        level = row_level(rule, total)[:, None]

    query_tile = query_tiles.load([batch, head, tile * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_D)
    grad_tile = grad_tiles.load([batch, head, tile * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_E)
    query_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for offset in tl.range(first, last, BLOCK_N):
        key_tile = key_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        value_tile = value_tiles.load([batch, key_head, offset, 0]).reshape(BLOCK_N, BLOCK_E)
        product = matmul(query_tile, key_tile.T, rule)
        key = (offset + tl.arange(0, BLOCK_N))[None, :]
        partial = (offset < inner_start) | (offset + BLOCK_N > inner_end) | rule.masked
        weight, slope = weight_and_slope(
            rule, terms, product, level, factor, inverse, flat_head, heads, group, query[:, None], key,
            num_queries, num_keys, partial, PRESCALED,
        )  # fmt: skip
        grad_weight = matmul(grad_tile, value_tile.T, rule)
        _, grad_weight = keep(rule, terms, weight, grad_weight, flat_head, query[:, None], key)
        grad_score = slope * (grad_weight - row_delta)
        query_sum = add_matmul(query_sum, grad_score.to(key_tile.dtype), key_tile, rule)
    query_sum = query_sum * slope_factor(rule, factor, inverse)
    store_rows(grad_query, flat_head, query, num_queries, query_sum, KEY_SIZE, BLOCK_D)


@triton.jit
def backward_bias_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    grad_tiles,
    log_normalizer,
    delta,
    grad_bias,
    rule,
    terms,
    scale,
    heads,
    group,
    num_queries,
    num_keys,
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
    """One program a tile of the bias; it sums over whatever the bias broadcasts to."""
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
        flat_head = batch * heads + head
        key_head = head // group
        query = query_start + tl.arange(0, BLOCK_M)
        key = key_start + tl.arange(0, BLOCK_N)
        row = flat_head.to(tl.int64) * num_queries + query
        known = query < num_queries
        row_delta = tl.load(delta + row, mask=known, other=0.0)[:, None]
        level = row_level(rule, tl.load(log_normalizer + row, mask=known, other=float("-inf")))
        factor = head_factor(terms, scale, head)
        inverse = 1.0
        if rule.folded:
            inverse = 1.0 / (factor * factor)
        query_tile = query_tiles.load([batch, head, query_start, 0]).reshape(BLOCK_M, BLOCK_D)
        key_tile = key_tiles.load([batch, key_head, key_start, 0]).reshape(BLOCK_N, BLOCK_D)
        product = matmul(query_tile, key_tile.T, rule)
        grad_tile = grad_tiles.load([batch, head, query_start, 0]).reshape(BLOCK_M, BLOCK_E)
        value_tile = value_tiles.load([batch, key_head, key_start, 0]).reshape(BLOCK_N, BLOCK_E)
        grad_weight = matmul(grad_tile, value_tile.T, rule)
        row, column = query[:, None], key[None, :]
        weight, _ = weight_and_slope(
            rule, terms, product, level[:, None], factor, inverse, flat_head, heads, group, row, column,
            num_queries, num_keys, key_start >= 0, False,
        )  # fmt: skip
        _, grad_weight = keep(rule, terms, weight, grad_weight, flat_head, row, column)
        total_sum += weight * (grad_weight - row_delta)
    key = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if bias_queries == 1:
        total_sum = tl.broadcast_to(tl.sum(total_sum, 0)[None, :], (BLOCK_M, BLOCK_N))
    if bias_keys == 1:
        total_sum = tl.broadcast_to(tl.sum(total_sum, 1)[:, None], (BLOCK_M, BLOCK_N))
    place = (tl.program_id(0).to(tl.int64) * bias_queries + query[:, None]) * bias_keys + key[
        None, :
    ]
    inside = (query < bias_queries)[:, None] & (key < bias_keys)[None, :]
    tl.store(grad_bias + place, total_sum, mask=inside)


def tile_bounds(problem: AttentionProblem, rows: int) -> Tensor:
    """What each tile of `rows` queries sees: [first key, last key), and [start, end) that all rows see.

    Returns:
        int32, (B or 1, tiles, 4).
    """
    ranges = problem.ranges
    assert ranges is not None
    num_queries, num_keys = problem.query.shape[2], problem.key.shape[2]
    start, end = problem.static_bounds(torch.arange(num_queries, device=problem.query.device))
    start, end = torch.maximum(start, ranges.start), torch.minimum(end, ranges.end)
    empty = start >= end
    start, end = start.masked_fill(empty, num_keys), end.masked_fill(empty, 0)
    last = torch.arange(triton.cdiv(num_queries, rows) * rows, device=start.device)
    last = last.clamp(max=num_queries - 1)
    start = start[:, last].unflatten(1, (-1, rows))
    end = end[:, last].unflatten(1, (-1, rows))
    bounds = (start.amin(-1), end.amax(-1), start.amax(-1), end.amin(-1))
    return torch.stack(bounds, dim=-1).to(torch.int32)


def backward(
    problem: AttentionProblem,
    out: Tensor,
    log_normalizer: Tensor,
    grad_out: Tensor,
    *,
    need_key_bias: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`ops.triton.backward`."""
    call = Call(problem)
    query, key, value = problem.query, problem.key, problem.value
    log_normalizer = log_normalizer.contiguous()
    prescaled = call.plain and query.dtype != torch.float16
    delta = torch.empty_like(log_normalizer)
    scaled = torch.empty_like(out) if prescaled else grad_out
    prepare_kernel[(call.batch * call.heads, triton.cdiv(call.num_queries, 64))](
        out,
        grad_out,
        log_normalizer,
        delta,
        scaled,
        call.heads,
        call.num_queries,
        *grad_out.stride(),
        VALUE_SIZE=call.value_size,
        PRESCALED=prescaled,
        BLOCK_M=64,
        BLOCK_E=call.block_e,
    )
    blocks = {"BLOCK_D": call.block_d, "BLOCK_E": call.block_e}

    shape = tile_shape("backward_key", call)
    grad_key = call.new(call.key_heads, call.num_keys, call.key_size, dtype=key.dtype)
    grad_value = call.new(call.key_heads, call.num_keys, call.value_size, dtype=value.dtype)
    grad_key_bias = None
    if need_key_bias:
        grad_key_bias = call.new(call.key_heads, call.num_keys, dtype=torch.float32)
    bounds = None if problem.ranges is None else tile_bounds(problem, shape.block_m)
    grid = (call.batch * call.key_heads, triton.cdiv(call.num_keys, shape.block_n))
    backward_key_kernel[grid](
        call.tiles(query, shape.block_m),
        call.tiles(key, shape.block_n),
        call.tiles(value, shape.block_n),
        call.tiles(scaled, shape.block_m),
        log_normalizer,
        delta,
        bounds,
        grad_key,
        grad_value,
        grad_key_bias,
        call.rule,
        call.terms,
        problem.scale,
        call.heads,
        call.num_queries,
        call.num_keys,
        triton.cdiv(call.num_queries, shape.block_m),
        GROUP=problem.group,
        KEY_SIZE=call.key_size,
        VALUE_SIZE=call.value_size,
        PRESCALED=prescaled,
        **blocks,
        **shape.options,
    )

    shape = tile_shape("backward_query", call)
    grad_query = call.new(call.heads, call.num_queries, call.key_size, dtype=query.dtype)
    grid = (call.batch * call.heads, triton.cdiv(call.num_queries, shape.block_m))
    backward_query_kernel[grid](
        call.tiles(query, shape.block_m),
        call.tiles(key, shape.block_n),
        call.tiles(value, shape.block_n),
        call.tiles(scaled, shape.block_m),
        log_normalizer,
        delta,
        grad_query,
        call.rule,
        call.terms,
        problem.scale,
        call.heads,
        problem.group,
        call.num_queries,
        call.num_keys,
        KEY_SIZE=call.key_size,
        PRESCALED=prescaled,
        **blocks,
        **shape.options,
    )

    grad_bias = None
    if need_bias:
        assert problem.bias is not None
        shape = tile_shape("backward_bias", call)
        grad_bias = torch.empty(problem.bias.shape, dtype=torch.float32, device=query.device)
        tiles = (
            triton.cdiv(call.num_queries, shape.block_m),
            triton.cdiv(call.num_keys, shape.block_n),
        )
        bias_batch, bias_heads, bias_queries, bias_keys = problem.bias.shape
        sums = (
            call.batch // bias_batch,
            call.heads // bias_heads,
            tiles[0] if bias_queries == 1 else 1,
            tiles[1] if bias_keys == 1 else 1,
        )
        bias_grid = (bias_batch * bias_heads, tiles[0] // sums[2], tiles[1] // sums[3])
        backward_bias_kernel[bias_grid](
            call.tiles(query, shape.block_m),
            call.tiles(key, shape.block_n),
            call.tiles(value, shape.block_n),
            call.tiles(grad_out, shape.block_m),
            log_normalizer,
            delta,
            grad_bias,
            call.rule,
            call.terms,
            problem.scale,
            call.heads,
            problem.group,
            call.num_queries,
            call.num_keys,
            *sums,
            bias_heads,
            bias_queries,
            bias_keys,
            **blocks,
            **shape.options,
        )
        grad_bias = grad_bias.to(problem.bias.dtype)
    return grad_query, grad_key, grad_value, grad_key_bias, grad_bias
