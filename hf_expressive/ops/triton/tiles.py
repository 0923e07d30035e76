"""Pieces of a score tile that every kernel shares: bounds, visibility, log-weights, responses, dropout.

A tile is indexed by a row index (queries) and a key index that broadcast against each other, so the
same functions serve tiles of shape (queries, keys) and the transposed ones of the backward pass.

Letters: B batch, H query heads, K key/value heads (H = K · group), Q queries, N keys,
D query/key size, E value size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..dropout import COLUMN_FACTOR, MIX_FACTOR_1, MIX_FACTOR_2
from ..problem import HIDDEN

HILL = tl.constexpr(0)
SQUARE = tl.constexpr(1)
EXP = tl.constexpr(2)


_HIDDEN = tl.constexpr(HIDDEN)
_COLUMN_FACTOR = tl.constexpr(COLUMN_FACTOR)
_MIX_FACTOR_1 = tl.constexpr(MIX_FACTOR_1)
_MIX_FACTOR_2 = tl.constexpr(MIX_FACTOR_2)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_TANH_RATE = tl.constexpr(-2.0 * 1.4426950408889634)
# Below the smallest normal number a row sum counts as zero, as in the reference.
TINY = tl.constexpr(1.1754943508222875e-38)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The compile-time choices of a launch, passed to kernels as one constant.

    Args:
        kind: `HILL`, `SQUARE` or `EXP`; power, epsilon, limit: see `response.Response`.
        threshold: dropout threshold of the 32-bit hash, 0 without dropout.
        plain: Hill response of power 1 of a bare product: no softcap, no additive log-weight.
        folded: scale² is not in the score: with `plain` it sits in s² / (s² + 1/scale²), with `SQUARE`
            it multiplies all weights and so only shifts the log normaliser.
        shifted: weights carry an additive log-weight, so that rows need a reference level for it.
        keyed: weights carry a factor a key, at most 1, known beforehand. It stands for an additive
            log-weight that depends on the key alone and spreads so little over the keys of a key/value
            head (`launch.STEADY`) that one reference level a head serves all rows. A second launch with
            `shifted` does the heads where it spreads more; which, is known on the device only.
        prescaled: the backward pass divides rows of dout by the normaliser beforehand.
        lift: power of two that keeps small weights out of the subnormal range of float16.
        wide: weights outgrow float16 and meet the values in tf32.
        precision: of float32 products, as `tl.dot` names it.
        fast: approximate reciprocal in inline assembly (relative error below 2⁻²³).
        interpreted: the kernel runs in Triton's interpreter.
    """

    kind: int
    power: float
    epsilon: float
    limit: float
    threshold: int
    plain: bool
    folded: bool
    shifted: bool
    keyed: bool
    prescaled: bool
    lift: float
    wide: bool
    precision: str
    fast: bool
    interpreted: bool


class Sizes(NamedTuple):
    """Sizes that kernels read at run time; `group` query heads share a key/value head."""

    heads: int
    group: int
    queries: int
    keys: int


class Terms(NamedTuple):
    """What a problem adds to scores and weights; an absent part is `None`, at compile time.

    Strides are in elements, 0 where a tensor broadcasts. `left` and `right` bound the keys around the
    diagonal d_i = i + N − Q: query i sees d_i − left < j < d_i + right. Flat, because Triton loses
    constants in nested tuples.

    Args:
        gain: (H,). key_bias: (B, K, N), contiguous.
        bias, mask: over (B, H, Q, N), each with four strides. sinks: over (B, H, Q), with three.
        key_factor: with `rule.keyed`, exp(key_bias − level), (B, K, N); level, (B · K,), its maximum.
        start, end: of `KeyRanges`, (B or 1, Q), with the batch stride; keys: (B or 1, N), likewise.
        runs: `launch.key_runs` of the keys, (B or 1, 3), likewise.
        cap: of the score.
        seed: of the dropout; keep_scale: 1 / (1 − probability).
    """

    gain: Any
    key_bias: Any
    key_factor: Any
    level: Any
    bias: Any
    bias_batch: int
    bias_head: int
    bias_query: int
    bias_key: int
    mask: Any
    mask_batch: int
    mask_head: int
    mask_query: int
    mask_key: int
    sinks: Any
    sinks_batch: int
    sinks_head: int
    sinks_query: int
    start: Any
    end: Any
    range_batch: int
    keys: Any
    keys_batch: int
    runs: Any
    runs_batch: int
    left: int | None
    right: int | None
    cap: float | None
    seed: Any
    keep_scale: float


@triton.jit
def program_place(bundle, tiles):
    """(flat head, tile) of this program, `bundle` heads at a time: all their first tiles, then the next.

    What the programs at work read is then what a bundle holds, which `Call.bundle` keeps within the L2
    cache; with all heads at once the loads of a long batch would come from memory.
    """
    first = tl.program_id(0) // (bundle * tiles) * bundle
    rest = tl.program_id(0) - first * tiles
    width = tl.minimum(bundle, tl.num_programs(0) // tiles - first)
    return first + rest % width, rest // width


@triton.jit
def head_factor(terms, scale, head):
    """scale · gain_h."""
    factor = scale
    if terms.gain is not None:
        factor = factor * tl.load(terms.gain + head)
    return factor


@triton.jit
def row_bounds(terms, sizes, batch, query):
    """[start, end) of the keys each query sees as far as causality, window and ranges say.

    Queries past the last one repeat its bounds, so that they never make a tile look partial.
    """
    query = tl.minimum(query, sizes.queries - 1)
    diagonal = query + (sizes.keys - sizes.queries)
    start = tl.zeros_like(query)
    end = start + sizes.keys
    if terms.left is not None:
        start = tl.maximum(start, diagonal - terms.left + 1)
    if terms.right is not None:
        end = tl.minimum(end, diagonal + terms.right)
    if terms.start is not None:
        row = batch.to(tl.int64) * terms.range_batch + query
        start = tl.maximum(start, tl.load(terms.start + row))
        end = tl.minimum(end, tl.load(terms.end + row))
    if terms.runs is not None:
        runs = terms.runs + batch * terms.runs_batch
        start = tl.maximum(start, tl.load(runs))
        end = tl.minimum(end, tl.load(runs + 1))
    return start, end


@triton.jit
def tile_span(terms, batch, start, end, num_keys):
    """From the bounds of a tile's rows: [first, last) that any of them sees, [inner_start, inner_end)
    that all of them see without a hole."""
    seen = start < end
    first = tl.min(tl.where(seen, start, num_keys), 0)
    last = tl.max(tl.where(seen, end, 0), 0)
    inner_start = tl.max(start, 0)
    inner_end = tl.min(end, 0)
    if terms.runs is not None:
        hole = tl.load(terms.runs + batch * terms.runs_batch + 2)
        inner_end = tl.minimum(inner_end, hole)
    if terms.mask is not None:
        inner_end = 0
    return first, last, inner_start, inner_end


@triton.jit
def row_place(batch, head, query, batch_stride, head_stride, query_stride):
    """Offset of rows in a tensor over (B, H, Q, …), int64."""
    place = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    return place + query.to(tl.int64) * query_stride


@triton.jit
def store_rows(
    rows, strides, batch, head, index, length, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes a tile into rows of a (B, heads, length, SIZE) tensor with these strides, the last 1."""
    size = tl.arange(0, BLOCK)
    place = row_place(batch, head, index[:, None], strides[0], strides[1], strides[2])
    inside = (index < length)[:, None] & (size < SIZE)[None, :]
    tl.store(rows + place + size[None, :], tile.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def is_idle(rule, steady, key_row):
    """Whether the launch with the other rule does the work of a key/value head; see `Rule.keyed`."""
    return (tl.load(steady + key_row) != 0) != rule.keyed


@triton.jit
def is_visible(terms, sizes, batch, head, start, end, query, key):
    """Which keys of the tile each query sees, bool; start, end: `row_bounds` of the queries."""
    visible = (key >= start) & (key < end)
    if terms.keys is not None:
        place = batch.to(tl.int64) * terms.keys_batch + key
        visible &= tl.load(terms.keys + place, mask=key < sizes.keys, other=0) != 0
    if terms.mask is not None:
        place = row_place(batch, head, query, terms.mask_batch, terms.mask_head, terms.mask_query)
        place = place + key.to(tl.int64) * terms.mask_key
        inside = (key < sizes.keys) & (query < sizes.queries)
        visible &= tl.load(terms.mask + place, mask=inside, other=0) != 0
    return visible


@triton.jit
def key_log_weight(terms, sizes, key_row, key):
    """The additive log-weight of keys; key_row = batch · K + key/value head."""
    additive = tl.zeros_like(key).to(tl.float32)
    if terms.key_bias is not None:
        place = key_row.to(tl.int64) * sizes.keys + key
        additive += tl.load(terms.key_bias + place, mask=key < sizes.keys, other=0.0)
    return additive


@triton.jit
def key_factors(terms, sizes, key_row, key):
    """The factors of `rule.keyed`, 0 past the last key."""
    place = key_row.to(tl.int64) * sizes.keys + key
    return tl.load(terms.key_factor + place, mask=key < sizes.keys, other=0.0)


@triton.jit
def log_weight(rule, terms, sizes, score, batch, head, key_row, query, key):
    """The additive log-weight of the tile; −inf where the bias hides the key."""
    additive = key_log_weight(terms, sizes, key_row, key)
    if rule.kind == EXP:
        additive += score
    if terms.bias is not None:
        place = row_place(batch, head, query, terms.bias_batch, terms.bias_head, terms.bias_query)
        place = place + key.to(tl.int64) * terms.bias_key
        inside = (key < sizes.keys) & (query < sizes.queries)
        value = tl.load(terms.bias + place, mask=inside, other=0.0).to(tl.float32)
        additive = tl.where(value > _HIDDEN, additive + value, float("-inf"))
    return additive


@triton.jit
def common_level(rule, terms, key_row, inverse):
    """The logarithm of what the tiles leave out of every weight of a key/value head."""
    level = 0.0
    if rule.folded and not rule.plain:  # scale²
        level -= tl.log2(inverse) * LN_2
    if rule.keyed and terms.level is not None:
        level += tl.load(terms.level + key_row)
    return level


@triton.jit
def exp(x):
    """eˣ. Differences are taken before the change of base, which would round both terms."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def exp_below(x):
    """eˣ where x exceeds 0 only by what one small response can account for; capped before infinity."""
    return exp(tl.minimum(x, 87.0))


@triton.jit
def finite(level):
    """The level of a row as a subtrahend: 0 where it is −inf, so that −inf − (−inf) never occurs."""
    return tl.where(level == float("-inf"), 0.0, level)


@triton.jit
def tanh(x):
    """Hyperbolic tangent with full relative accuracy: near zero, where 1 − e⁻²ˣ cancels, the series."""
    square = x * x
    series = -17.0 / 315 + square * (62.0 / 2835)
    series = 2.0 / 15 + square * series
    series = x * (1.0 + square * (-1.0 / 3 + square * series))
    decay = tl.exp2(tl.abs(x) * _TANH_RATE)
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def score_of(rule, terms, product, factor):
    """z from q·k; q·k itself with `rule.folded`."""
    score = product
    if not rule.folded:
        score = product * factor
    if terms.cap is not None:
        score = terms.cap * tanh(score / terms.cap)
    return score


@triton.jit
def reciprocal(x, rule):
    """1 / x."""
    if rule.fast:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def hill_parts(score, rule):
    """z²ⁿ, z²ⁿ/z and 1 / (1 + z²ⁿ) of the clamped score."""
    clamped = tl.minimum(tl.maximum(score, -rule.limit), rule.limit)
    square = clamped * clamped
    if rule.power == 1.0:
        raised = square
        over = clamped
    elif rule.power == 2.0:
        raised = square * square
        over = clamped * square
    elif rule.power == 3.0:
        raised = square * square * square
        over = clamped * square * square
    elif rule.power == 4.0:
        raised = (square * square) * (square * square)
        over = clamped * square * (square * square)
    else:
        zero = square < TINY
        raised = tl.exp2(tl.log2(tl.where(zero, 1.0, square)) * rule.power)
        raised = tl.where(zero, 0.0, raised)
        over = raised / tl.where(zero, 1.0, clamped)
    return raised, over, reciprocal(1.0 + raised, rule)


@triton.jit
def response(score, inverse, rule):
    """g(z); 1 for "exp", whose score is part of the log-weight; g(z) / scale² with `rule.folded`."""
    if rule.kind == HILL:
        raised, _, rest = hill_parts(score, rule)
        return raised * rest
    elif rule.kind == SQUARE:
        return score * score + rule.epsilon * inverse
    else:
        return tl.zeros_like(score) + 1.0


@triton.jit
def response_and_slope(score, inverse, rule):
    """`response` and its derivative (half of it for "square"); for "exp" both without exp(z)."""
    if rule.kind == HILL:
        raised, over, rest = hill_parts(score, rule)
        return raised * rest, over * rest * rest * (2.0 * rule.power)
    elif rule.kind == SQUARE:
        return score * score + rule.epsilon * inverse, score
    else:
        one = tl.zeros_like(score) + 1.0
        return one, one


@triton.jit
def plain_weight(product, inverse, rule):
    """s² / (s² + inverse): the Hill response of power 1 of z = s / √inverse.

    The fast form takes one reciprocal for two elements, 1/(ab) = 1/a · 1/b, because the reciprocal
    unit is the bottleneck. s² is clamped to 1e18 (bits 5d5e0b6b), where the response is 1.
    """
    if rule.fast:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b, p, q, r;
            mul.rn.f32 a, $2, $2;
            mul.rn.f32 b, $3, $3;
            min.f32 a, a, 0f5d5e0b6b;
            min.f32 b, b, 0f5d5e0b6b;
            add.rn.f32 p, a, $4;
            add.rn.f32 q, b, $5;
            mul.rn.f32 r, p, q;
            rcp.approx.ftz.f32 r, r;
            mul.rn.f32 a, a, q;
            mul.rn.f32 b, b, p;
            mul.rn.f32 $0, a, r;
            mul.rn.f32 $1, b, r;
            }""",
            "=f,=f,f,f,f,f",
            [product, inverse],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        square = tl.minimum(product * product, 1e18)
        return square / (square + inverse)


@triton.jit
def plain_weight_and_slope(product, inverse, rule):
    """w = s² / (s² + inverse), and s / (s² + inverse)², which is dw/ds / (2 · inverse)."""
    square = tl.minimum(product * product, 1e37)
    rest = reciprocal(square + inverse, rule)
    return square * rest, product * rest * rest


@triton.jit
def mix(x):
    """The 32-bit mixer of `ops.dropout`."""
    x = x ^ (x >> 16)
    x = x * _MIX_FACTOR_1
    x = x ^ (x >> 15)
    x = x * _MIX_FACTOR_2
    return x ^ (x >> 16)


@triton.jit
def row_hash(terms, flat_head, query):
    """The part of the dropout hash that the keys share; flat_head = batch · H + head."""
    seed = tl.load(terms.seed).to(tl.uint32)
    return mix(mix(flat_head.to(tl.uint32) ^ seed) ^ query.to(tl.uint32))


@triton.jit
def is_kept(row, key, rule):
    """Which normalised weights dropout keeps."""
    return mix(row ^ (key.to(tl.uint32) * _COLUMN_FACTOR)) >= rule.threshold


@triton.jit
def matmul(a, b, rule):
    """a @ b in float32."""
    if rule.interpreted:  # whose products of bfloat16 are wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=rule.precision)


@triton.jit
def add_matmul(accumulator, a, b, rule):
    """accumulator + a @ b."""
    if rule.interpreted:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=rule.precision)


@triton.jit
def weigh(accumulator, weight, value_tile, rule):
    """accumulator + lift · weight @ value."""
    if rule.wide:
        return tl.dot(weight, value_tile.to(tl.float32), accumulator, input_precision="tf32")
    else:
        return add_matmul(accumulator, (weight * rule.lift).to(value_tile.dtype), value_tile, rule)
