"""From an `AttentionProblem` and the gradient of its output to a launch of the backward kernel.

Three small kernels stand around it: one works out which queries see each tile of keys, one prepares
δ and rows of dout divided by the normaliser, one turns the float32 sum for dq into the
gradient in the dtype of the query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import AttentionProblem
from ..triton.launch import (
    ceil_div,
    contiguous_float,
    is_foldable,
    num_processors,
)
from .launch import pieces, tiles
from .plan import FIELDS, ROWS, is_arithmetic, plan, reach
from .tiled_backward import backward_kernel

#: Keys of a tile of `backward_kernel`.
KEYS = 128
#: Queries of a step.
QUERIES = 64
# Queries, gradients and float32 sums of the heads that programs work on at a time should stay in the
# L2 cache, of which an H200 has 50 MiB.
_BAND_BYTES = 32 * 2**20
# The largest row that `prepare_kernel` divides by a tiny sum must stay below the largest bfloat16.
_LARGEST_LOGARITHM = 87.0


@triton.jit(do_not_specialize=["num_tiles"])
def span_kernel(tiles, spans, num_tiles, KEYS: tl.constexpr, FIELDS: tl.constexpr):
    """The plan seen from the keys: (first tile of queries that sees some of the keys of a tile, one
    past the last, how many do); [0, 1) and 0 where none does."""
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
    tl.store(entry, tl.where(count > 0, first, 0))
    tl.store(entry + 1, tl.where(count > 0, last, 1))
    tl.store(entry + 2, count)


@triton.jit(do_not_specialize=["heads", "num_queries"])
def prepare_kernel(
    out, grad_out, log_normalizer, delta, scaled, turns, counter,
    heads, num_queries, grad_batch, grad_head, grad_query, grad_size, limit,
    SIZE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """dout and δ divided by the normaliser, for a tile of queries; sets the counters to 0."""
    row = tl.program_id(0)
    batch = row // heads
    head = row % heads
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    size = tl.arange(0, SIZE)
    known = query < num_queries
    inside = known[:, None] & (size >= 0)[None, :]
    place = batch.to(tl.int64) * grad_batch + head.to(tl.int64) * grad_head
    place = place + query[:, None].to(tl.int64) * grad_query + size[None, :] * grad_size
    start = row.to(tl.int64) * num_queries
    total = tl.load(log_normalizer + start + query, mask=known, other=float("-inf"))
    # A tile that sees nothing is not read, but written: the kernel takes two such tiles as one.
    count = tl.sum((total != float("-inf")).to(tl.int32), 0)
    read = inside & (known.to(tl.int32) * count > 0)[:, None]
    gradient = tl.load(grad_out + place, mask=read, other=0.0).to(tl.float32)
    place = (start + query)[:, None] * SIZE + size[None, :]
    value = tl.load(out + place, mask=read, other=0.0).to(tl.float32)
    product = tl.sum(gradient * value, 1)
    inverse = tl.exp2(tl.minimum(-total, limit) * 1.4426950408889634)
    inverse = tl.where(total == float("-inf"), 0.0, inverse)
    padded = row.to(tl.int64) * (tl.num_programs(1) * QUERIES) + query
    gradient = gradient * inverse[:, None]
    tl.store(scaled + place, gradient.to(scaled.dtype.element_ty), mask=inside)
    tl.store(delta + padded, product * inverse)
    tl.store(turns + row * tl.num_programs(1) + tl.program_id(1), 0)
    if row + tl.program_id(1) == 0:
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["heads", "num_queries", "patterns"])
def finish_kernel(
    sums, tiles, grad_query, final, heads, num_queries, patterns,
    SIZE: tl.constexpr, ROWS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries: its float32 sum times a constant, 0 where it sees no key.

    `tiled_backward` wrote them step by step, in the order of its `store_part`.
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
    total = total.permute(0, 3, 8, 4, 6, 1, 5, 2, 7, 9).reshape(ROWS, SIZE)
    query = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    size = tl.arange(0, SIZE)
    place = (row.to(tl.int64) * num_queries + query)[:, None] * SIZE + size[None, :]
    tl.store(
        grad_query + place, total.to(grad_query.dtype.element_ty),
        mask=(query < num_queries)[:, None] & (size >= 0)[None, :],
    )  # fmt: skip


def gradients(
    problem: AttentionProblem, out: Tensor, log_normalizer: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes; arguments as of `ops.triton.backward`."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, num_queries, size = query.shape
    key_heads, num_keys = key.shape[1:3]
    count = ceil_div(num_queries, ROWS)
    parts = ROWS // QUERIES
    power = int(problem.response.power)
    # As in the forward kernel.
    folded = is_foldable(problem)
    inverse, final = 1.0, 2.0 * power
    if folded:
        inverse = problem.scale ** (-2 * power)
        final *= inverse
    elif problem.gain is None:
        final *= problem.scale
    key_tiles = ceil_div(num_keys, KEYS)
    new = query.new_empty
    spans = seen = starts = ends = None
    patterns = 1
    if not is_arithmetic(problem):
        tables = plan(problem)
        patterns, seen = tables.patterns, tables.tiles
        starts, ends = tables.rows
        spans = new(patterns, key_tiles, 3, dtype=torch.int32)
        span_kernel[(key_tiles, patterns)](
            seen, spans, count, KEYS=KEYS, FIELDS=FIELDS, num_warps=4
        )

    width = count * ROWS
    delta = new(batch * heads, width, dtype=torch.float32)
    scaled = torch.empty_like(out)
    turns = new(batch * heads, count * parts, dtype=torch.int32)
    counter = new(1, dtype=torch.int32)
    prepare_kernel[(batch * heads, count * parts)](
        out, grad_out, log_normalizer.contiguous(), delta, scaled, turns, counter,
        heads, num_queries, *grad_out.stride(), _LARGEST_LOGARITHM,
        SIZE=size, QUERIES=QUERIES,
    )  # fmt: skip
    # Whole tiles, because the elements of a step are in an order of their own: size × 64.
    sums = new(batch * heads, count * parts * size, QUERIES, dtype=torch.float32)
    grad_key = new(batch, key_heads, num_keys, size)
    grad_value = new(batch, key_heads, num_keys, size)
    row_bytes = size * (2 * query.element_size() + 4)
    band = max(1, _BAND_BYTES // (problem.group * num_queries * row_bytes))
    band = min(band, batch * key_heads)
    backward_kernel[(min(num_processors(problem), key_tiles * batch * key_heads),)](
        tiles(query, QUERIES),
        tiles(key, KEYS),
        tiles(value, KEYS),
        tiles(scaled, QUERIES),
        pieces(delta, 1, QUERIES),
        pieces(sums, 1, size, QUERIES),
        tiles(grad_key, KEYS),
        tiles(grad_value, KEYS),
        spans,
        seen,
        counter,
        turns,
        contiguous_float(problem.gain),
        starts,
        ends,
        float(problem.scale),
        inverse,
        final,
        key_tiles,
        batch * key_heads,
        band,
        key_heads,
        problem.group,
        patterns,
        count,
        num_keys - num_queries,
        *reach(problem),
        num_keys,
        STAGES=3,
        POWER=power,
        FOLDED=folded,
        SINGLE=problem.sinks is None,
        num_warps=8,
    )
    grad_query = torch.empty_like(out)
    finish_kernel[(batch * heads, count)](
        sums, seen, grad_query, final, heads, num_queries, patterns,
        SIZE=size, ROWS=ROWS, FIELDS=FIELDS,
    )  # fmt: skip
    return grad_query, grad_key, grad_value
