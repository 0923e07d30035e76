"""What the backward kernels share, deterministic: see `backward_key`, `backward_query`, `backward_bias`.

With P the normalised weights, kept those that dropout keeps (divided by 1 − p, else 0),
δ_i = dout_i·out_i and e = exp(additive − log_normalizer):

    d(log-weight)_ij = P_ij (kept_ij dout_i·v_j − δ_i)
    dz_ij            = e_ij g'(z_ij) (kept_ij dout_i·v_j − δ_i)
    dv_j = Σ_i kept_ij P_ij dout_i      dq_i = factor Σ_j dz_ij k_j      dk_j = factor Σ_i dz_ij q_i

A row that sees nothing has δ = 0 and e = 0. With `rule.prescaled` e is the same for a whole row, but
for a factor of the key, so the row of dout and δ are multiplied by it once, and the tiles never see it.
A row that sees a single key has dz = 0: its bracket is a difference of two roundings, and g'/g = 2/z
would make much of it. (Where one key is left by a mask of another kind than bounds, that noise stays.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import launch
from .launch import Call, TileShape, ceil_div
from .tiles import (
    SQUARE,
    Rule,
    common_level,
    exp,
    exp_below,
    is_idle,
    is_kept,
    is_visible,
    log_weight,
    plain_weight_and_slope,
    response_and_slope,
    row_bounds,
    row_hash,
    row_place,
    score_of,
    tile_span,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What every backward kernel reads beside the operands.

    Args:
        call: the call.
        grad_out: dout (B, H, Q, E), with `rule.prescaled` times e.
        log_normalizer: (B, H, Q). delta: δ, likewise, with `rule.prescaled` times e.
        spans: `tile_span` of each tile of queries of `backward_key`, int32 (B or 1, tiles, 4), or `None`
            where it follows from causality and window.
    """

    call: Call
    grad_out: Tensor
    log_normalizer: Tensor
    delta: Tensor
    spans: Tensor | None

    def operands(self, shape: TileShape) -> tuple[Any, ...]:
        """The first arguments of every backward kernel: tiles of q, k, v and dout, log normaliser, δ."""
        call, problem = self.call, self.call.problem
        return (
            call.tiles(problem.query, shape.block_m),
            call.tiles(problem.key, shape.block_n),
            call.tiles(problem.value, shape.block_n),
            call.tiles(self.grad_out, shape.block_m),
            self.log_normalizer,
            self.delta,
        )


@triton.jit
def row_level(rule, total, common):
    """What e takes of the normaliser: its logarithm if weights are shifted, else its inverse.

    common: see `common_level`.
    """
    empty = total == float("-inf")
    if rule.shifted:
        return tl.where(empty, float("inf"), total - common)
    else:
        return tl.where(empty, 0.0, exp_below(common - total))


@triton.jit
def prepare_kernel(
    out,
    grad_out,
    log_normalizer,
    delta,
    scaled,
    spans,
    steady,
    rule: tl.constexpr,
    terms,
    sizes,
    scale,
    grad_strides,
    out_strides,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """δ, the prescaled dout and, by the programs of the first head, the spans."""
    batch = tl.program_id(0) // sizes.heads
    head = tl.program_id(0) % sizes.heads
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if spans is not None:  # noqa: SIM102 - decided at compile time
        if (head == 0) & ((batch == 0) | (terms.range_batch != 0) | (terms.runs_batch != 0)):
            start, end = row_bounds(terms, sizes, batch, query)
            first, last, inner_start, inner_end = tile_span(terms, batch, start, end, sizes.keys)
            spans += (batch * tl.num_programs(1) + tl.program_id(1)) * 4
            tl.store(spans, first)
            tl.store(spans + 1, last)
            tl.store(spans + 2, inner_start)
            tl.store(spans + 3, inner_end)
    if steady is not None and not rule.keyed:  # noqa: SIM102 - decided at compile time
        if is_idle(rule, steady, tl.program_id(0) // sizes.group):
            return
    size = tl.arange(0, BLOCK_E)
    inside = (query < sizes.queries)[:, None] & (size < VALUE_SIZE)[None, :]
    row = tl.program_id(0).to(tl.int64) * sizes.queries + query
    place = row_place(
        batch, head, query[:, None], grad_strides[0], grad_strides[1], grad_strides[2]
    )
    place += size[None, :] * grad_strides[3]
    gradient = tl.load(grad_out + place, mask=inside, other=0.0).to(tl.float32)
    place = row_place(batch, head, query[:, None], out_strides[0], out_strides[1], out_strides[2])
    value = tl.load(out + place + size[None, :], mask=inside, other=0.0)
    product = tl.sum(gradient * value.to(tl.float32), 1)
    if rule.prescaled:
        total = tl.load(log_normalizer + row, mask=query < sizes.queries, other=0.0)
        key_row = tl.program_id(0) // sizes.group
        factor = 1.0
        if rule.folded:
            factor = 1.0 / (scale * scale)
        inverse = row_level(rule, total, common_level(rule, terms, key_row, factor))
        if steady is not None:
            inverse = tl.where(tl.load(steady + key_row) != 0, inverse, 1.0)
        product = product * inverse
        gradient = gradient * inverse[:, None]
        tl.store(
            scaled + row[:, None] * VALUE_SIZE + size[None, :],
            gradient.to(scaled.dtype.element_ty),
            mask=inside,
        )
    tl.store(delta + row, product, mask=query < sizes.queries)


def prepare(
    call: Call, out: Tensor, log_normalizer: Tensor, grad_out: Tensor, rule: Rule | None = None
) -> Prepared:
    """Launches `prepare_kernel`, for all heads or for those that one of the call's rules is for."""
    rule = rule or call.rule
    problem, rows = call.problem, call.tile_shape("backward_key").block_m
    log_normalizer = log_normalizer.contiguous()
    delta = torch.empty_like(log_normalizer)
    scaled = grad_out
    if rule.prescaled:
        scaled = call.new(call.heads, call.num_queries, call.value_size, dtype=out.dtype)
    tiles = ceil_div(call.num_queries, rows)
    spans = None
    if problem.ranges is not None:
        terms = call.terms
        batch = call.batch if terms.range_batch or terms.runs_batch else 1
        spans = torch.empty(batch, tiles, 4, dtype=torch.int32, device=out.device)
    launch(
        prepare_kernel,
        (call.batch * call.heads, tiles),
        out,
        grad_out,
        log_normalizer,
        delta,
        scaled,
        spans,
        call.steady,
        rule,
        call.terms,
        call.sizes,
        problem.scale,
        grad_out.stride(),
        out.stride(),
        VALUE_SIZE=call.value_size,
        BLOCK_M=rows,
        BLOCK_E=call.blocks["BLOCK_E"],
    )
    return Prepared(call, scaled, log_normalizer, delta, spans)


@triton.jit
def known_bounds(terms, sizes, batch, start, end, query):
    """`row_bounds`, from memory or arithmetic only where they are not at hand."""
    if start is None:
        low, high = row_bounds(terms, sizes, batch, query)
    else:
        low = start
        high = end
    return low, high


@triton.jit
def weight_and_slope(
    rule,
    terms,
    sizes,
    product,
    level,
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
    """(normalised weights, e g'(z) without `slope_factor`) of a tile from q·k, without key factors.

    level: of `row_level`; with `rule.prescaled` it is not read and nothing is normalised.
    start, end: `row_bounds` of the queries, or `None`: they are found where they are needed.
    """
    score = score_of(rule, terms, product, factor)
    if rule.plain:
        weight, slope = plain_weight_and_slope(score, inverse, rule)
    else:
        weight, slope = response_and_slope(score, inverse, rule)
        if terms.cap is not None:
            ratio = score / terms.cap
            slope = slope * (1.0 - ratio * ratio)
    if rule.shifted:
        additive = log_weight(rule, terms, sizes, score, batch, head, key_row, query, key)
        # Naming the score keeps the tile in the layout of products.
        additive = tl.where(score == score, additive, 0.0)
        if partial:
            low, high = known_bounds(terms, sizes, batch, start, end, query)
            visible = is_visible(terms, sizes, batch, head, low, high, query, key)
            additive = tl.where(visible, additive, float("-inf"))
            if terms.sinks is None:
                slope = tl.where(high - low == 1, 0.0, slope)
        boost = exp(additive - level)
        weight = weight * boost
        slope = slope * boost
    else:
        if partial:
            low, high = known_bounds(terms, sizes, batch, start, end, query)
            visible = is_visible(terms, sizes, batch, head, low, high, query, key)
            weight = tl.where(visible, weight, 0.0)
            if terms.sinks is None:
                visible &= high - low > 1
            slope = tl.where(visible, slope, 0.0)
        if not rule.prescaled:
            weight = weight * level
            slope = slope * level
    return weight, slope


@triton.jit
def drop(rule, terms, grad_weight, flat_head, query, key):
    """Dropout of the gradient of normalised weights."""
    if rule.threshold > 0:
        kept = is_kept(row_hash(terms, flat_head, query), key, rule)
        return tl.where(kept, grad_weight * terms.keep_scale, 0.0)
    else:
        return grad_weight


@triton.jit
def slope_factor(rule, factor, inverse):
    """The constant that the tiles leave out of dz."""
    if rule.plain and rule.folded:
        return 2.0 * inverse
    elif rule.folded:
        return 2.0
    elif rule.plain or rule.kind == SQUARE:
        return 2.0 * factor
    else:
        return factor
