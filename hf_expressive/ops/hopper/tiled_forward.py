"""The forward kernel for Hopper GPUs, in Gluon: a producer warp and two consumer warp groups.

A program stays on its multiprocessor and takes tile after tile (128 queries of one head) from a
counter. The producer copies tiles into shared memory asynchronously, as far ahead as there is room.
Each consumer holds 64 of the queries and takes one step a block of keys:

    scores of the next block = Q·Kᵀ        asynchronous, first in line
    output += weights · V                  asynchronous, behind it
    weights of the next block              on the arithmetic units, while the products run

Weights need no running maximum, so nothing that was accumulated is ever rescaled. Steps run on across
the end of a tile: its last values share a step with the first keys of the next tile, and what they
summed up is finished while the keys after those are multiplied. A stage of the ring buffer therefore
holds the pair that one step needs: the values of a block and the keys of the block after it, with their
factors where there are any.
"""

# ruff: noqa: RUF059 - the tuples that hold a kernel's state are unpacked whole, by name
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .operations import (
    as_multiplied,
    lane_sums,
    load_tile,
    number,
    reciprocal,
    store_tile,
    unsigned,
)
from .work import (
    band_of,
    count_seen_by_all,
    entries_of,
    place_in_bands,
    seen_by_all,
    seen_by_any,
)

_LN_2 = gl.constexpr(0.6931471805599453)
_LOG2_E = gl.constexpr(1.4426950408889634)
# Below the smallest normal number a row sum counts as zero, as in the reference.
_TINY = gl.constexpr(1.1754943508222875e-38)


@gluon.jit
def weights_of(
    score, factor, inverse, factors,
    POWER: gl.constexpr, FOLDED: gl.constexpr, KEYED: gl.constexpr,
):  # fmt: skip
    """z²ⁿ / (1 + z²ⁿ) of z = factor · score, or s²ⁿ / (s²ⁿ + inverse) with `FOLDED`.

    With `POWER` 0 the square response: z² + inverse, or s² + inverse with `FOLDED`. factors: with
    `KEYED`, what the weights of each key are multiplied by.

    Power 1 is not clamped, which would cost 7 % of the whole kernel: a score beyond 1.8e19, whose square
    is infinite, gives NaN. Power 2 clamps z² where the response is 1 to the last bit.
    """
    if not FOLDED:
        score = score * factor
    raised = score * score
    if POWER == 2:
        raised = gl.minimum(raised, 1e18)
        raised = raised * raised
    weight = raised + inverse
    if POWER > 0:
        weight = raised * reciprocal(weight)
    if KEYED:
        weight = weight * factors
    return weight


@gluon.jit
def place(index, shape):
    """(tile, row of B · H) of a work item: band by band of heads, the last tiles of a band first."""
    tiles, rows, band, tail, heads, group, patterns, num_queries = shape
    position, row, is_last = place_in_bands(index, tiles, rows, band, tail)
    return tiles - 1 - position, row


@gluon.jit
def item(index, shape, table, limits, KEYS: gl.constexpr):
    """(tile, batch, head, row of B · K, first block, number of blocks of keys) of a work item.

    A number of 0 or less: the tile sees nothing, and `plan.fill_empty` has written its rows.
    """
    tiles, rows, band, tail, heads, group, patterns, num_queries = shape
    tile, row = place(gl.minimum(index, tiles * rows - 1), shape)
    batch = row // heads
    head = row - batch * heads
    start, end = seen_by_any(tile, entries_of(batch, table, patterns, tiles), limits)
    first = start // KEYS
    return tile, batch, head, row // group, first, gl.cdiv(end, KEYS) - first


@gluon.jit
def following_item(counter):
    """The next work item that no program has taken yet."""
    return gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")


@gluon.jit
def announce(buffer, slot, tile, batch, head, key_row, first, count):
    """Writes a work item for the consumers; tile −1: there is none left."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    buffer.index(8 * slot + 0).store(gl.full([1], tile, gl.int32, ONE))
    buffer.index(8 * slot + 1).store(gl.full([1], batch, gl.int32, ONE))
    buffer.index(8 * slot + 2).store(gl.full([1], head, gl.int32, ONE))
    buffer.index(8 * slot + 3).store(gl.full([1], key_row, gl.int32, ONE))
    buffer.index(8 * slot + 4).store(gl.full([1], first, gl.int32, ONE))
    buffer.index(8 * slot + 5).store(gl.full([1], count, gl.int32, ONE))


@gluon.jit
def published(buffer, barriers, turn):
    """The work item of a turn, in the order of `announce`'s arguments."""
    queries_in, queries_out, step_in, step_out, index_in, index_out = barriers
    slot = turn & 1
    mbarrier.wait(index_in.index(slot), (turn >> 1) & 1)
    tile = number(buffer, 8 * slot, 4)
    batch = number(buffer, 8 * slot + 1, 4)
    head = number(buffer, 8 * slot + 2, 4)
    key_row = number(buffer, 8 * slot + 3, 4)
    first = number(buffer, 8 * slot + 4, 4)
    count = number(buffer, 8 * slot + 5, 4)
    mbarrier.arrive(index_out.index(slot), count=1)
    return tile, batch, head, key_row, first, count


@gluon.jit
def visibility(
    tile, batch, keys, shape, tables, limits,
    half: gl.constexpr, HALF: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """What half a tile sees: [start, end) of what all of its queries see, and of each; with a mask of
    keys, how many all of them see."""
    table, bounds = tables
    tiles, rows, band, tail, heads, group, patterns, num_queries = shape
    tile = gl.maximum(tile, 0)
    query = tile * (2 * HALF) + half * HALF + gl.arange(0, HALF, LAYOUT)
    entries = entries_of(batch, table, patterns, tiles)
    inner_start, inner_end = seen_by_all(2 * tile + half, entries, limits)
    if table is None:
        start, end = band_of(query, limits)
    else:
        pattern = gl.minimum(batch, patterns - 1)
        start = gl.load(bounds + pattern * (tiles * 2 * HALF) + query)
        end = gl.load(bounds + (patterns + pattern) * (tiles * 2 * HALF) + query)
    count = 0
    if keys is not None:
        count = count_seen_by_all(2 * tile + half, entries)
    return inner_start, inner_end, start, end, count


@gluon.jit
def producer(
    descriptors, buffers, barriers, table, counter, shape, limits,
    HALF: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    query_tiles, key_tiles, value_tiles, factor_tiles = descriptors
    query_buffer, key_buffer, value_buffer, factor_buffer, index_buffer, out_buffer = buffers
    queries_in, queries_out, step_in, step_out, index_in, index_out = barriers
    tiles, rows, band, tail, heads, group, patterns, num_queries = shape
    total, key_heads = tiles * rows, heads // group
    KEY_BYTES: gl.constexpr = key_tiles.block_type.nbytes + (
        0 if factor_tiles is None else factor_tiles.block_type.nbytes
    )
    VALUE_BYTES: gl.constexpr = value_tiles.block_type.nbytes
    step = 0
    turn = 0
    values_batch, values_head, values_start = 0, 0, 0
    index = gl.program_id(0)
    tile, batch, head, key_row, first, count = item(index, shape, table, limits, KEYS)
    while (count <= 0) & (index < total):
        index = following_item(counter)
        tile, batch, head, key_row, first, count = item(index, shape, table, limits, KEYS)
    announce(index_buffer, 0, gl.where(index < total, tile, -1), batch, head, key_row, first, count)
    mbarrier.arrive(index_in.index(0), count=1)
    while index < total:
        # Asked for here, the answer is there when this tile's copies have been issued.
        index = following_item(counter)
        key_head = key_row - batch * key_heads
        slot = turn & 1
        for half in gl.static_range(2):
            mbarrier.wait(queries_out.index(2 * slot + half), ((turn >> 1) & 1) ^ 1)
            ready = queries_in.index(2 * slot + half)
            mbarrier.expect(ready, query_tiles.block_type.nbytes)
            load_tile(
                query_tiles, [batch, head, tile * (2 * HALF) + half * HALF, 0], ready,
                query_buffer.index(2 * slot + half),
            )  # fmt: skip
        for back in range(count):
            stage = step % STAGES
            ready = step_in.index(stage)
            mbarrier.wait(step_out.index(stage), ((step // STAGES) & 1) ^ 1)
            if step == 0:
                mbarrier.expect(ready, KEY_BYTES)
            else:
                mbarrier.expect(ready, KEY_BYTES + VALUE_BYTES)
                load_tile(
                    value_tiles, [values_batch, values_head, values_start, 0], ready,
                    value_buffer.index(stage),
                )  # fmt: skip
            start = (first + count - 1 - back) * KEYS
            load_tile(key_tiles, [batch, key_head, start, 0], ready, key_buffer.index(stage))
            if factor_tiles is not None:
                load_tile(factor_tiles, [key_row, start], ready, factor_buffer.index(stage))
            values_batch, values_head, values_start = batch, key_head, start
            step += 1
        tile, batch, head, key_row, first, count = item(index, shape, table, limits, KEYS)
        while (count <= 0) & (index < total):
            index = following_item(counter)
            tile, batch, head, key_row, first, count = item(index, shape, table, limits, KEYS)
        turn += 1
        slot = turn & 1
        mbarrier.wait(index_out.index(slot), ((turn >> 1) & 1) ^ 1)
        known = gl.where(index < total, tile, -1)
        announce(index_buffer, slot, known, batch, head, key_row, first, count)
        mbarrier.arrive(index_in.index(slot), count=1)
    if step > 0:
        stage = step % STAGES
        ready = step_in.index(stage)
        mbarrier.wait(step_out.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(ready, VALUE_BYTES)
        load_tile(
            value_tiles, [values_batch, values_head, values_start, 0], ready,
            value_buffer.index(stage),
        )  # fmt: skip


@gluon.jit
def hide(tile, start, end, begin, keys, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """The scores or weights of a block that starts at key `begin`, 0 where the key is hidden."""
    key = begin + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    # One comparison for two: a key before the first is, unsigned, far behind the last.
    length = unsigned(gl.maximum(end - start, 0))
    visible = unsigned(key[None, :] - start[:, None]) < length[:, None]
    if keys is not None:
        shown = gl.load(keys + key, mask=key < gl.max(end, 0), other=0) != 0
        visible = visible & shown[None, :]
    return gl.where(visible, tile, 0.0)


@gluon.jit
def constants_of(head, key_row, terms, POWER: gl.constexpr, FOLDED: gl.constexpr):
    """(factor, inverse, base) of a head: arguments of `weights_of`, and the logarithm of what all of
    its weights lack, with which a sink is compared."""
    (
        scale, gain, sinks, sinks_batch, sinks_head, sinks_query, keys, keys_batch,
        levels, common_level, epsilon,
    ) = terms  # fmt: skip
    factor = scale
    if gain is not None:
        factor = factor * gl.load(gain + head)
    inverse = 1.0
    if POWER == 0:
        inverse = epsilon
    elif FOLDED:
        inverse = 1.0 / (factor * factor)
        if POWER == 2:
            inverse = inverse * inverse
    base = common_level
    if levels is not None:
        base = base + gl.load(levels + key_row)
    return factor, inverse, base


@gluon.jit
def weigh(
    score, factors, begin, batch, seen, constants, sums, terms, SCORE: gl.constexpr,
    DTYPE: gl.constexpr, POWER: gl.constexpr, FOLDED: gl.constexpr, LIFT: gl.constexpr,
):  # fmt: skip
    """Weights of the block that starts at key `begin`, and the row sums with them added.

    Rows that may see few keys are summed from rounded weights, so that the output of a single key is its
    value exactly; `rounding` is what that changes, because the log normaliser is that of the exact sum.
    """
    inner_start, inner_end, start, end, count = seen
    factor, inverse, base = constants
    total, rounding = sums
    (
        scale, gain, sinks, sinks_batch, sinks_head, sinks_query, keys, keys_batch,
        levels, common_level, epsilon,
    ) = terms  # fmt: skip
    HALF: gl.constexpr = score.shape[0]
    KEYS: gl.constexpr = score.shape[1]
    KEYED: gl.constexpr = levels is not None
    partial = (begin < inner_start) | (begin + KEYS > inner_end)
    few = inner_end - inner_start < KEYS
    row_keys = keys
    if keys is not None:
        few = count < KEYS
        row_keys = keys + batch.to(gl.int64) * keys_batch
    if partial:
        if POWER > 0:  # the weight of score 0 is 0
            score = hide(score, start, end, begin, row_keys, KEYS, SCORE)
        weight = weights_of(score, factor, inverse, factors, POWER, FOLDED, KEYED)
        if POWER == 0:
            weight = hide(weight, start, end, begin, row_keys, KEYS, SCORE)
        if few:
            exact = lane_sums(weight, HALF, KEYS)
            weight = as_multiplied(weight, DTYPE, LIFT)
            rounding = rounding + (lane_sums(weight, HALF, KEYS) - exact)
    else:
        weight = weights_of(score, factor, inverse, factors, POWER, FOLDED, KEYED)
    return weight, total + lane_sums(weight, HALF, KEYS), rounding


@gluon.jit
def finish(
    out, work, base, sums, staging, out_tiles, log_normalizer, terms, shape,
    half: gl.constexpr, ROW: gl.constexpr, OUT: gl.constexpr, LIFT: gl.constexpr,
):  # fmt: skip
    """Normalises half a tile's output and starts its way to memory through `staging`."""
    tile, batch, head = work
    total, rounding = sums
    (
        scale, gain, sinks, sinks_batch, sinks_head, sinks_query, keys, keys_batch,
        levels, common_level, epsilon,
    ) = terms  # fmt: skip
    tiles, rows, band, tail, heads, group, patterns, num_queries = shape
    HALF: gl.constexpr = out.shape[0]
    rounding = gl.convert_layout(gl.sum(rounding, 1), ROW)
    total = gl.convert_layout(gl.sum(total, 1), ROW)
    first = tile * (2 * HALF) + half * HALF
    query = first + gl.arange(0, HALF, ROW)
    level = gl.zeros([HALF], gl.float32, ROW) + base
    normalise = 1.0 / LIFT
    if sinks is not None:
        sink = gl.load(
            sinks + batch.to(gl.int64) * sinks_batch + head.to(gl.int64) * sinks_head
            + query.to(gl.int64) * sinks_query,
            mask=query < num_queries, other=float("-inf"),
        ).to(gl.float32)  # fmt: skip
        level = gl.maximum(sink, level)
        shrink = gl.exp2((base - level) * _LOG2_E)
        total = total * shrink + gl.exp2((sink - level) * _LOG2_E)
        rounding = rounding * shrink
        normalise = shrink * normalise
    exact_total = total - rounding
    seen = exact_total >= _TINY
    exact_total = gl.where(seen, exact_total, 1.0)
    heavy = total >= _TINY
    total = gl.where(heavy, total, 1.0)
    normalise = gl.where(heavy, normalise / total, 0.0)
    out = out * gl.convert_layout(normalise, gl.SliceLayout(1, OUT))[:, None]
    # The tile before has left, long ago.
    tma.store_wait(0)
    staging.reshape([HALF, out.shape[1]]).store(out.to(staging.dtype))
    fence_async_shared()
    store_tile(out_tiles, [batch, head, first, 0], staging)
    # After the fence, which would wait for it.
    gl.store(
        log_normalizer + (batch * heads + head).to(gl.int64) * num_queries + query,
        gl.where(seen, gl.log2(exact_total) * _LN_2 + level, float("-inf")),
        mask=query < num_queries,
    )


@gluon.jit
def consumer(
    half: gl.constexpr, out_tiles, buffers, barriers, tables, terms, log_normalizer, shape, limits,
    HALF: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, POWER: gl.constexpr,
    FOLDED: gl.constexpr, LIFT: gl.constexpr,
):  # fmt: skip
    query_buffer, key_buffer, value_buffer, factor_buffer, index_buffer, out_buffer = buffers
    queries_in, queries_out, step_in, step_out, index_in, index_out = barriers
    SIZE: gl.constexpr = query_buffer.shape[4]
    VALUE_SIZE: gl.constexpr = value_buffer.shape[4]
    DTYPE: gl.constexpr = query_buffer.dtype
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_SIZE, 16])
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    KEYED: gl.constexpr = terms[8] is not None
    no_score = gl.zeros([HALF, KEYS], gl.float32, SCORE)
    staging = out_buffer.index(half)

    # The first block of the first tile; its weights are the only ones that no product hides.
    turn = 0
    tile, batch, head, key_row, first, count = published(index_buffer, barriers, turn)
    keys = terms[6]
    seen = visibility(tile, batch, keys, shape, tables, limits, half, HALF, ROW)
    constants = constants_of(head, key_row, terms, POWER, FOLDED)
    begin = (first + count - 1) * KEYS
    mbarrier.wait(queries_in.index(half), 0, pred=tile >= 0)
    mbarrier.wait(step_in.index(0), 0, pred=tile >= 0)
    score = warpgroup_mma(
        query_buffer.index(half).reshape([HALF, SIZE]),
        key_buffer.index(0).reshape([KEYS, SIZE]).permute((1, 0)),
        no_score, use_acc=False, is_async=True,
    )  # fmt: skip
    score = warpgroup_mma_wait(0, deps=[score])
    factors = factor_buffer.index(0)
    if KEYED:
        factors = factors.load(SCORE)
    mbarrier.arrive(step_out.index(0), count=1)
    nothing = lane_sums(no_score, HALF, KEYS)
    weight, total, rounding = weigh(
        score, factors, begin, batch, seen, constants, (nothing, nothing), terms,
        SCORE, DTYPE, POWER, FOLDED, LIFT,
    )  # fmt: skip
    operand = gl.convert_layout((weight * LIFT).to(DTYPE), WEIGHT)
    out = gl.zeros([HALF, VALUE_SIZE], gl.float32, OUT)
    # Values of their own: Triton does not carry a name through two loops that starts as another's alias.
    done, done_base, done_sums = (
        (tile * 0, batch * 0, head * 0),
        constants[2] * 0,
        (nothing, nothing),
    )
    ahead = (tile, batch, head, key_row, first, count)
    step = 1
    mbarrier.wait(step_in.index(step % STAGES), 0, pred=tile >= 0)

    while tile >= 0:
        for position in range(count):
            stage = step % STAGES
            is_last = position + 1 == count
            if is_last:
                # All scores of this tile are there.
                mbarrier.arrive(queries_out.index(2 * (turn & 1) + half), count=1)
                turn += 1
                ahead = published(index_buffer, barriers, turn)
                ready = queries_in.index(2 * (turn & 1) + half)
                mbarrier.wait(ready, (turn >> 1) & 1, pred=ahead[0] >= 0)
            queries = query_buffer.index(2 * (turn & 1) + half).reshape([HALF, SIZE])
            score = warpgroup_mma(
                queries, key_buffer.index(stage).reshape([KEYS, SIZE]).permute((1, 0)),
                no_score, use_acc=False, is_async=True,
            )  # fmt: skip
            if (position == 0) & (step > 1):
                finish(
                    out, done, done_base, done_sums, staging, out_tiles, log_normalizer, terms, shape,
                    half, ROW, OUT, LIFT,
                )  # fmt: skip
            out = warpgroup_mma(
                operand, value_buffer.index(stage).reshape([KEYS, VALUE_SIZE]), out,
                use_acc=position > 0, is_async=True,
            )  # fmt: skip
            begin -= KEYS
            if is_last:
                done, done_base, done_sums = (tile, batch, head), constants[2], (total, rounding)
                tile, batch, head, key_row, first, count = ahead
                begin = (first + count - 1) * KEYS
                seen = visibility(tile, batch, keys, shape, tables, limits, half, HALF, ROW)
                constants = constants_of(head, key_row, terms, POWER, FOLDED)
                total, rounding = nothing, nothing
            score = warpgroup_mma_wait(1, deps=[score])
            factors = factor_buffer.index(stage)
            if KEYED:
                factors = factors.load(SCORE)
            weight, total, rounding = weigh(
                score, factors, begin, batch, seen, constants, (total, rounding), terms,
                SCORE, DTYPE, POWER, FOLDED, LIFT,
            )  # fmt: skip
            step += 1
            # A wait is a branch, across which the assembler does not move code: without one here the
            # weights would be computed after the products that they should overlap.
            mbarrier.wait(step_in.index(step % STAGES), (step // STAGES) & 1, pred=tile >= 0)
            out = warpgroup_mma_wait(0, deps=[out])
            mbarrier.arrive(step_out.index(stage), count=1)
            operand = gl.convert_layout((weight * LIFT).to(DTYPE), WEIGHT)
    if step > 1:
        finish(
            out, done, done_base, done_sums, staging, out_tiles, log_normalizer, terms, shape,
            half, ROW, OUT, LIFT,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "tiles", "rows", "band", "tail", "heads", "group", "patterns", "num_queries",
        "offset", "left", "right", "num_keys",
    ]
)  # fmt: skip
def forward_kernel(
    query_tiles, key_tiles, value_tiles, factor_tiles, out_tiles, log_normalizer,
    table, bounds, counter,
    gain, sinks, keys, levels,
    scale, common_level, epsilon, sinks_batch, sinks_head, sinks_query, keys_batch,
    tiles, rows, band, tail, heads, group, patterns, num_queries, offset, left, right, num_keys,
    HALF: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, POWER: gl.constexpr,
    FOLDED: gl.constexpr, LIFT: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = query_tiles.dtype
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    query_buffer = gl.allocate_shared_memory(
        DTYPE, [4, 1, 1, HALF, query_tiles.block_shape[3]], query_tiles.layout
    )
    key_buffer = gl.allocate_shared_memory(
        DTYPE, [STAGES, 1, 1, KEYS, key_tiles.block_shape[3]], key_tiles.layout
    )
    value_buffer = gl.allocate_shared_memory(
        DTYPE, [STAGES, 1, 1, KEYS, value_tiles.block_shape[3]], value_tiles.layout
    )
    factor_buffer = key_buffer
    if factor_tiles is not None:
        factor_buffer = gl.allocate_shared_memory(
            gl.float32, [STAGES, 1, KEYS], factor_tiles.layout
        )
    out_buffer = gl.allocate_shared_memory(
        DTYPE, [2, 1, 1, HALF, out_tiles.block_shape[3]], out_tiles.layout
    )
    index_buffer = gl.allocate_shared_memory(
        gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    queries_in = gl.allocate_shared_memory(gl.int64, [4, 1], BAR)
    queries_out = gl.allocate_shared_memory(gl.int64, [4, 1], BAR)
    step_in = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    step_out = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    index_in = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    index_out = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(4):
        mbarrier.init(queries_in.index(i), count=1)
        mbarrier.init(queries_out.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(step_in.index(i), count=1)
        mbarrier.init(step_out.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(index_in.index(i), count=1)
        mbarrier.init(index_out.index(i), count=2)
    fence_async_shared()
    descriptors = (query_tiles, key_tiles, value_tiles, factor_tiles)
    buffers = (query_buffer, key_buffer, value_buffer, factor_buffer, index_buffer, out_buffer)
    barriers = (queries_in, queries_out, step_in, step_out, index_in, index_out)
    terms = (
        scale, gain, sinks, sinks_batch, sinks_head, sinks_query, keys, keys_batch,
        levels, common_level, epsilon,
    )  # fmt: skip
    shape = (tiles, rows, band, tail, heads, group, patterns, num_queries)
    tables = (table, bounds)
    limits = (offset, left, right, num_keys)
    gl.warp_specialize(
        [
            (consumer, (0, out_tiles, buffers, barriers, tables, terms, log_normalizer, shape,
                        limits, HALF, KEYS, STAGES, POWER, FOLDED, LIFT)),
            (consumer, (1, out_tiles, buffers, barriers, tables, terms, log_normalizer, shape,
                        limits, HALF, KEYS, STAGES, POWER, FOLDED, LIFT)),
            (producer, (descriptors, buffers, barriers, table, counter, shape, limits,
                        HALF, KEYS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
