"""From an `AttentionProblem` and the gradient of its output to a launch of the backward kernel.

Small kernels stand around it: one works out which queries see each tile of keys, one clears what none
sees, one prepares δ and rows of dout divided by the normaliser, one turns the float32 sum for dq into
the gradient in the dtype of the query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..layout import empty_rows
from ..problem import AttentionProblem
from ..triton.backward_key import write_key_gradients
from ..triton.backward_query import write_query_gradient
from ..triton.gradient import prepare
from ..triton.host import launch
from ..triton.launch import (
    Call,
    ceil_div,
    contiguous_float,
    element_strides,
    is_foldable,
    num_processors,
    shown_keys,
)
from ..triton.tiles import row_place, store_rows
from .launch import pieces, square_terms, tiles
from .plan import FIELDS, ROWS, is_arithmetic, plan, reach
from .tiled_backward import backward_kernel

#: Keys of a tile of `backward_kernel`.
KEYS = 128
#: Queries of a step.
QUERIES = 64
# Queries, gradients and float32 sums of the heads that programs work on at a time should stay in the
# L2 cache, of which an H200 has 50 MiB: half of that in bands of items that add up a group's query heads
# by themselves, more where they share sums of dk and dv, which come and go by bulk copies.
_BAND_BYTES = 16 * 2**20
_SHARED_BAND_BYTES = 32 * 2**20
# Mean number of items for each program in the last band of heads: under causality its longest item is
# twice the mean, and with 2 the others have enough to do beside it. But not more bytes than these.
_TAIL = 2
_TAIL_BYTES = 128 * 2**20
# With more programs than that for each key/value head of a sequence, items of a whole group of query
# heads are too few and too long.
_PROGRAMS_A_HEAD = 16
# The largest row that `prepare_kernel` divides by a tiny sum must stay below the largest bfloat16.
_LARGEST_LOGARITHM = 87.0


@triton.jit(do_not_specialize=["num_tiles"])
def span_kernel(tiles, spans, num_tiles, KEYS: tl.constexpr, FIELDS: tl.constexpr):
    """The plan seen from the keys: (first tile of queries that sees some of the keys of a tile, one
    past the last, how many do)."""
    start = tl.program_id(0) * KEYS
    pattern = tl.program_id(1)
    tiles += pattern * num_tiles * FIELDS
    first = num_tiles
    last = 0
    count = 0
    for chunk in range(0, num_tiles, 128):
        tile = chunk + tl.arange(0, 128)
        known = tile < num_tiles
        low = tl.load(tiles + tile * FIELDS, mask=known, other=0)
        high = tl.load(tiles + tile * FIELDS + 1, mask=known, other=0)
        touched = (low < start + KEYS) & (high > start) & known
        first = tl.minimum(first, tl.min(tl.where(touched, tile, num_tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(touched, tile + 1, 0), 0))
        count += tl.sum(touched.to(tl.int32), 0)
    entry = spans + (pattern * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(entry, first)
    tl.store(entry + 1, last)
    tl.store(entry + 2, count)


@triton.jit(do_not_specialize=["key_heads", "patterns", "num_keys", "first_seen"])
def clear_kernel(
    spans, grad_key, grad_value, grad_key_bias, key_heads, patterns, num_keys, first_seen,
    key_strides, value_strides,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients 0 for the tiles of keys that no query sees.

    first_seen: without `spans`, the first key that any query sees.
    """
    row = tl.program_id(0)
    batch = row // key_heads
    head = row % key_heads
    tile = tl.program_id(1)
    if spans is None:
        if tile * KEYS + KEYS > first_seen:
            return
    else:
        pattern = tl.minimum(batch, patterns - 1)
        if tl.load(spans + (pattern * tl.num_programs(1) + tile) * 3 + 2) > 0:
            return
    key = tile * KEYS + tl.arange(0, KEYS)
    nothing = tl.zeros((KEYS, 64), tl.float32)
    for start in tl.static_range(0, SIZE, 64):
        store_rows(grad_key + start, key_strides, batch, head, key, num_keys, nothing, 64, 64)
    for start in tl.static_range(0, VALUE_SIZE, 64):
        store_rows(grad_value + start, value_strides, batch, head, key, num_keys, nothing, 64, 64)
    if grad_key_bias is not None:
        place = row.to(tl.int64) * num_keys + key
        tl.store(grad_key_bias + place, tl.zeros((KEYS,), tl.float32), mask=key < num_keys)


@triton.jit(do_not_specialize=["heads", "group", "num_queries", "patterns"])
def prepare_kernel(
    out, grad_out, log_normalizer, levels, steady, tiles, delta, scaled, turns, counter,
    heads, group, num_queries, patterns, out_strides, grad_strides, common_level, limit,
    SIZE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """dout and −δ divided by the normaliser, for the queries of a step; sets the counters to 0.

    levels, common_level: logarithm of what all weights of a key/value head, and of the call, lack.
    steady: which key/value heads have such a level; the others' gradients are made otherwise.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    tl.store(turns + row * tl.num_programs(1) + part, 0)
    if row + part == 0:
        tl.store(counter, 0)
    batch = row // heads
    if tiles is not None:
        # What sees nothing is never asked for.
        count = tl.num_programs(1) // (ROWS // QUERIES)
        entry = tl.minimum(batch, patterns - 1) * count + part // (ROWS // QUERIES)
        if tl.load(tiles + entry * FIELDS) >= tl.load(tiles + entry * FIELDS + 1):
            return
    head = row % heads
    query = part * QUERIES + tl.arange(0, QUERIES)
    size = tl.arange(0, SIZE)
    known = query < num_queries
    inside = known[:, None] & (size >= 0)[None, :]
    place = row_place(
        batch, head, query[:, None], grad_strides[0], grad_strides[1], grad_strides[2]
    )
    place += size[None, :] * grad_strides[3]
    gradient = tl.load(grad_out + place, mask=inside, other=0.0).to(tl.float32)
    place = row_place(batch, head, query[:, None], out_strides[0], out_strides[1], out_strides[2])
    value = tl.load(out + place + size[None, :], mask=inside, other=0.0).to(tl.float32)
    start = row.to(tl.int64) * num_queries
    product = tl.sum(gradient * value, 1)
    total = tl.load(log_normalizer + start + query, mask=known, other=float("-inf"))
    level = common_level
    if levels is not None:
        level = level + tl.load(levels + row // group)
    inverse = tl.exp2(tl.minimum(level - total, limit) * 1.4426950408889634)
    inverse = tl.where(total == float("-inf"), 0.0, inverse)
    if steady is not None:
        inverse = tl.where(tl.load(steady + row // group) != 0, inverse, 1.0)
    padded = row.to(tl.int64) * (tl.num_programs(1) * QUERIES) + query
    gradient = gradient * inverse[:, None]
    place = (start + query)[:, None] * SIZE + size[None, :]
    tl.store(scaled + place, gradient.to(scaled.dtype.element_ty), mask=inside)
    tl.store(delta + padded, -product * inverse)


@triton.jit(do_not_specialize=["heads", "num_queries", "patterns"])
def finish_kernel(
    sums, tiles, grad_query, final, heads, num_queries, patterns, strides,
    SIZE: tl.constexpr, ROWS: tl.constexpr, FIELDS: tl.constexpr, ROOMY: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries: its float32 sum times a constant, 0 where it sees no key.

    `tiled_backward` wrote them step by step, in the order of its `store_part`; with `ROOMY` transposed.
    """
    row = tl.program_id(0)
    place = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (ROWS * SIZE)
    element = tl.arange(0, ROWS * SIZE)
    if tiles is None:
        total = tl.load(sums + place + element)
    else:
        pattern = tl.minimum(row // heads, patterns - 1)
        entry = tiles + (pattern * tl.num_programs(1) + tl.program_id(1)) * FIELDS
        seen = tl.zeros((ROWS * SIZE,), tl.int32) + tl.load(entry) < tl.load(entry + 1)
        total = tl.load(sums + place + element, mask=seen, other=0.0)
    total = (total * final).reshape(ROWS // 64, 2, 4, 4, 4, SIZE // 64, 2, 4, 2, 2)
    if ROOMY:
        total = total.permute(0, 1, 5, 2, 7, 9, 3, 8, 4, 6).reshape(ROWS, SIZE)
    else:
        total = total.permute(0, 3, 8, 4, 6, 1, 5, 2, 7, 9).reshape(ROWS, SIZE)
    query = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    store_rows(
        grad_query, strides, row // heads, row % heads, query, num_queries, total, SIZE, SIZE
    )


def group_bytes(problem: AttentionProblem) -> int:
    """Bytes of queries, gradients and float32 sums of the query heads of a key/value head."""
    size, value_size = problem.query.shape[3], problem.value.shape[3]
    row_bytes = (size + value_size) * problem.query.element_size() + 4 * size
    return problem.group * problem.query.shape[2] * row_bytes


def has_whole_rows(problem: AttentionProblem) -> bool:
    """Whether at most causality hides keys."""
    return problem.sliding_window is None and is_arithmetic(problem)


def is_shared(problem: AttentionProblem) -> bool:
    """Whether each query head is a work item of its own, although several share a key/value head.

    Programs that step through all query heads of a key/value head drift apart from one head to the next.
    Where these fill a band by themselves, their rows leave the L2 cache meanwhile; and where there are
    few key/value heads, the last programs work alone. With heads of 64 the sums cost more than that. A
    window or `KeyRanges` may leave too little work for a tile of keys with one query head.
    """
    batch, key_heads, _, size = problem.key.shape
    if problem.group == 1 or problem.value.shape[3] != size or not has_whole_rows(problem):
        return False
    are_few = batch * key_heads * _PROGRAMS_A_HEAD < num_processors(problem)
    return (are_few and size > QUERIES) or group_bytes(problem) >= _SHARED_BAND_BYTES


def half_tiles(tensor: Tensor) -> TensorDescriptor:
    """Descriptor of the left and right halves of tiles of keys of a float32 sum."""
    return pieces(tensor.flatten(0, 1), 1, KEYS, tensor.shape[3] // 2)


def gradients(
    problem: AttentionProblem,
    out: Tensor,
    log_normalizer: Tensor,
    grad_out: Tensor,
    *,
    need_key_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, where needed, of `key_bias`, in their shapes.

    Arguments as of `ops.triton.backward`; heads whose key bias spreads widely as in `launch.forward`.
    """
    query, key, value, response = problem.query, problem.key, problem.value, problem.response
    batch, heads, num_queries, size = query.shape
    key_heads, num_keys, value_size = value.shape[1:]
    count = ceil_div(num_queries, ROWS)
    parts = ROWS // QUERIES
    # Registers to spare: see `tiled_backward`.
    roomy = size == value_size == QUERIES
    # As in the forward kernel.
    folded = is_foldable(problem)
    epsilon, common_level = square_terms(problem)
    if response.kind == "square":
        power, inverse, final = 0, epsilon, 2.0
    else:
        power, inverse = int(response.power), 1.0
        final = 2.0 * power
        if folded:
            inverse = problem.scale ** (-2 * power)
            final *= inverse
    if not folded and problem.gain is None:
        final *= problem.scale
    call = key_factor = levels = steady = None
    if problem.key_bias is not None:
        call = Call(problem)
        key_factor, levels, steady = call.key_factor, call.level, call.steady
    key_tiles = ceil_div(num_keys, KEYS)
    new = query.new_empty
    grad_query, grad_key, grad_value = (empty_rows(x, x.shape[3]) for x in (query, key, value))
    share, key_turns, key_sums = 1, None, (grad_key, grad_value)
    if is_shared(problem):
        # Each query head adds its part of dk and dv, whole tiles, to float32 sums.
        share = problem.group
        key_turns = query.new_zeros(batch * key_heads * key_tiles, dtype=torch.int32)
        whole = (batch, key_heads, key_tiles * KEYS, size)
        key_sums = new(whole, dtype=torch.float32), new(whole, dtype=torch.float32)
    grad_key_bias = None
    if need_key_bias:
        grad_key_bias = new(share, batch, key_heads, num_keys, dtype=torch.float32)
    left, right = reach(problem)
    first_seen = max(0, num_keys - num_queries + 1 - left)
    spans = seen = starts = ends = None
    keys = shown_keys(problem)
    patterns = 1
    if not is_arithmetic(problem):
        tables = plan(problem)
        patterns, seen = tables.patterns, tables.tiles
        starts, ends = tables.rows
        spans = new(patterns, key_tiles, 3, dtype=torch.int32)
        launch(
            span_kernel, (key_tiles, patterns),
            seen, spans, count,
            KEYS=KEYS, FIELDS=FIELDS, num_warps=4,
        )  # fmt: skip
    if spans is not None or first_seen >= KEYS:
        launch(
            clear_kernel, (batch * key_heads, key_tiles),
            spans, grad_key, grad_value, grad_key_bias, key_heads, patterns, num_keys, first_seen,
            grad_key.stride(), grad_value.stride(),
            SIZE=size, VALUE_SIZE=value_size, KEYS=KEYS,
        )  # fmt: skip

    width = count * ROWS
    delta = new(batch * heads, width, dtype=torch.float32)
    scaled = new(batch, heads, num_queries, value_size)
    turns = new(batch * heads, count * parts, dtype=torch.int32)
    counter = new(1, dtype=torch.int32)
    launch(
        prepare_kernel, (batch * heads, count * parts),
        out, grad_out, log_normalizer.contiguous(), levels, steady, seen,
        delta, scaled, turns, counter,
        heads, problem.group, num_queries, patterns, out.stride(), grad_out.stride(),
        common_level, _LARGEST_LOGARITHM,
        SIZE=value_size, QUERIES=QUERIES, ROWS=ROWS, FIELDS=FIELDS,
    )  # fmt: skip
    # Whole tiles, because the elements of a step are in an order of their own: size × 64.
    sums = new(batch * heads, count * parts * size, QUERIES, dtype=torch.float32)
    head_bytes = group_bytes(problem) // share
    rows = batch * key_heads * share
    band_bytes = _BAND_BYTES if share == 1 else _SHARED_BAND_BYTES
    band = min(max(1, band_bytes // head_bytes), rows)
    programs = min(num_processors(problem), key_tiles * rows)
    # Items of a group are longer.
    items = _TAIL if problem.group == share else 1
    tail = min(ceil_div(items * programs, key_tiles), max(1, _TAIL_BYTES // head_bytes), rows)
    # Programs drift apart where items become longer; in a band of many rows not far.
    is_growing = problem.is_causal and has_whole_rows(problem)
    sweep = programs if is_growing and band == 1 else key_tiles
    launch(
        backward_kernel,
        (programs,),
        tiles(query, QUERIES),
        tiles(key, KEYS),
        tiles(value, KEYS),
        tiles(scaled, QUERIES),
        pieces(delta, 1, QUERIES),
        pieces(sums, 1, size, QUERIES),
        *(tiles(x, KEYS) if share == 1 else half_tiles(x) for x in key_sums),
        spans,
        seen,
        counter,
        turns,
        key_turns,
        contiguous_float(problem.gain),
        key_factor,
        grad_key_bias,
        starts,
        ends,
        keys,
        *element_strides(keys, 1),
        float(problem.scale),
        inverse,
        final,
        key_tiles,
        rows,
        band,
        tail,
        sweep,
        key_heads,
        share,
        problem.group // share,
        patterns,
        count,
        num_keys - num_queries,
        left,
        right,
        num_keys,
        STAGES=3,
        POWER=power,
        FOLDED=folded,
        SINGLE=problem.sinks is None,
        ROOMY=roomy,
        num_warps=8,
    )
    launch(
        finish_kernel, (batch * heads, count),
        sums, seen, grad_query, final, heads, num_queries, patterns, grad_query.stride(),
        SIZE=size, ROWS=ROWS, FIELDS=FIELDS, ROOMY=roomy,
    )  # fmt: skip
    if share > 1:
        for gradient, total in zip((grad_key, grad_value), key_sums, strict=True):
            gradient.copy_(total[:, :, :num_keys])
    if grad_key_bias is not None:
        grad_key_bias = grad_key_bias.sum(0) if share > 1 else grad_key_bias[0]
    if call is not None:
        _, for_wide_spreads = call.rules()
        prepared = prepare(call, out, log_normalizer, grad_out, for_wide_spreads)
        write_key_gradients(prepared, for_wide_spreads, grad_key, grad_value, grad_key_bias)
        write_query_gradient(prepared, for_wide_spreads, grad_query)
    return grad_query, grad_key, grad_value, grad_key_bias
