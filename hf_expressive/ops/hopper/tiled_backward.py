"""The backward kernel for Hopper GPUs, in Gluon: five products a tile, additions in a fixed order.

With P the weights, slope = g' and δ as in `ops.triton.gradient`, a program takes a tile of 128 keys of
one head, keeps dk and dv in registers and steps through the queries that see some of the keys:

    Sᵀ = K·Qᵀ    dPᵀ = V·doutᵀ − δ    dv += Pᵀ·dout    dSᵀ = slope · dPᵀ    dk += dSᵀ·Q    dq = dS·K

Each of two consumer warp groups owns 64 of the keys; P stays in registers, dS goes through shared
memory, because dq needs all 128 keys. A step multiplies for two tiles of queries, so that the product
units are busy while weights are computed:

    Sᵀ of this tile, dq and dk of the tile before      asynchronous; dq leaves for shared memory
    dPᵀ of this tile                                   asynchronous, while weights are computed
    dv of this tile                                    asynchronous, while dS is computed and stored

A writer warp adds dq to a float32 sum in global memory by bulk copies. Tiles of queries receive the
parts of their keys from the last keys to the first, always in this order: a counter a tile of queries
says whose turn it is. Programs take the tiles of a head in the same order, so a program only ever
waits for one that started earlier; with causality later keys also begin with later queries, and the
turns come round by themselves.
"""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .plan import FIELDS, ROWS
from .tiled_forward import _load, _store, reciprocal

_FIELDS = gl.constexpr(FIELDS)
_ROWS = gl.constexpr(ROWS)
#: Keys of a tile, and of a consumer.
_KEYS = gl.constexpr(128)
_HALF = gl.constexpr(64)


@builtin
def _add(tensor_desc, coord, src, _semantic=None):
    """Asynchronous addition of a tile in shared memory to one in global memory."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle
    )


@gluon.jit
def arrivals(pointer):
    """The counter at `pointer`.

    Relaxed: the additions that it orders take place in the L2 cache. An acquiring load would empty the
    L1 cache, where the consumers' spilled registers are; that cost a quarter of the whole kernel.
    """
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.u32 $0, [$1];", "=r,l", [pointer],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def nothing(step):
    """0, which the compiler does not know: it would otherwise keep the operands' descriptors, dozens of
    registers, from before the loop."""
    return step >> 30


@gluon.jit
def publish(pointer, PENDING: gl.constexpr):
    """Waits until all but the last `PENDING` bulk copies are in global memory, raises the counter."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 lane;
        cp.async.bulk.wait_group """
        + PENDING
        + """;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.eq.u32 p, lane, 0;
        @p red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def weight_and_slope(
    score, factor, inverse, level, DTYPE: gl.constexpr, POWER: gl.constexpr, FOLDED: gl.constexpr
):
    """g in the dtype of the products and g' without its constant, of z = factor · score.

    See `tiled_forward`. Rounded at once, because all of this takes many registers. level: what both
    are multiplied by, or `None`.
    """
    if not FOLDED:
        score = score * factor
    raised = score * score
    over = score
    if POWER == 2:
        raised = gl.minimum(raised, 1e18)
        over = score * raised
        raised = raised * raised
    rest = reciprocal(raised + inverse)
    weight = raised * rest
    slope = over * rest * rest
    if level is not None:
        weight = weight * level
        slope = slope * level
    return weight.to(DTYPE), slope


@gluon.jit
def bounds_of(query, item, tensors, limits):
    """[start, end) of the keys that queries see."""
    starts, ends = tensors[1], tensors[2]
    if starts is None:
        start = query + (limits[0] + 1 - limits[1])
        end = query + (limits[0] + limits[2])
    else:
        start = gl.load(starts + item[1] + query)
        end = gl.load(ends + item[1] + query)
    return gl.maximum(start, item[2]), gl.minimum(end, item[3])


@gluon.jit
def hide(score, query, item, tensors, limits, SCORE: gl.constexpr):
    """The scores of a tile, 0 (weight and slope 0) where the key is hidden."""
    shown = tensors[3]
    start, end = bounds_of(query, item, tensors, limits)
    key = item[0] + gl.arange(0, _HALF, gl.SliceLayout(1, SCORE))
    visible = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
    if shown is not None:
        known = gl.load(shown + item[4] + key, mask=key < item[3], other=0) != 0
        visible = visible & known[:, None]
    return gl.where(visible, score, 0.0)


@gluon.jit
def place(index, shape):
    """(tile of keys, row of B · K, rising) of a work item: band by band of heads.

    A band starts with its last keys and steps through queries upwards. The last band is `rising`: it
    starts with its first keys and steps downwards, so that with causality the short items end the work.
    """
    tiles, rows, band = shape[0], shape[1], shape[2]
    area = tiles * band
    first = index // area * band
    rest = index % area
    width = gl.minimum(band, rows - first)
    rising = first + band >= rows
    tile = rest // width
    return gl.where(rising, tile, tiles - 1 - tile), first + rest % width, rising


@gluon.jit
def span_of(tile, row, shape, spans):
    """(first plan tile, one past the last, how many see some of the keys, whether keys are hidden)."""
    tiles, key_heads, patterns = shape[0], shape[3], shape[7]
    pattern = gl.minimum(row // key_heads, patterns - 1)
    entry = spans + (pattern * tiles + tile) * 4
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def next_item(buffers, barriers, turn, WARPS: gl.constexpr):
    """What the producer has published for this turn."""
    slot = turn & 1
    mbarrier.wait(barriers[8].index(slot), (turn >> 1) & 1)
    index = gl.max(buffers[6].index(slot).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(barriers[9].index(slot), count=1)
    return index


@gluon.jit
def producer(
    descriptors, buffers, barriers, spans, table, counter, shape,
    SUBS: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    query_tiles, key_tiles, value_tiles, grad_tiles, delta_tiles, level_tiles = (
        descriptors[0], descriptors[1], descriptors[2], descriptors[3], descriptors[4], descriptors[5],
    )  # fmt: skip
    query_buffer, key_buffer, value_buffer, grad_buffer, delta_buffer, level_buffer = (
        buffers[0], buffers[1], buffers[2], buffers[3], buffers[4], buffers[5],
    )  # fmt: skip
    index_buffer, code_buffer = buffers[6], buffers[7]
    keys_in, keys_out, queries_in, queries_out, grads_in, grads_out = (
        barriers[0], barriers[1], barriers[2], barriers[3], barriers[4], barriers[5],
    )  # fmt: skip
    index_in, index_out = barriers[8], barriers[9]
    total, key_heads, group, patterns, query_tiles_count = (
        shape[0] * shape[1], shape[3], shape[4], shape[5], shape[6],
    )  # fmt: skip
    QUERIES: gl.constexpr = SUBS * _HALF
    PER: gl.constexpr = _ROWS // QUERIES
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    TERMS: gl.constexpr = delta_tiles.block_type.nbytes * (1 if SCALED else 2)
    step = 0
    turn = 0
    index = gl.atomic_add(counter, 1)
    while index >= 0:
        slot = turn & 1
        mbarrier.wait(index_out.index(slot), ((turn >> 1) & 1) ^ 1)
        index_buffer.index(slot).store(gl.full([1], index, gl.int32, ONE))
        mbarrier.arrive(index_in.index(slot), count=1)
        if index < total:
            tile, row, rising = place(index, shape)
            batch = row // key_heads
            key_head = row % key_heads
            first, last, count, hole = span_of(tile, row, shape, spans)
            key_start = tile * _KEYS
            entries = table + gl.minimum(batch, patterns - 1) * query_tiles_count * _FIELDS
            mbarrier.wait(keys_out, (turn & 1) ^ 1)
            mbarrier.expect(keys_in, 4 * key_tiles.block_type.nbytes)
            for half in gl.static_range(2):
                at = [batch, key_head, key_start + half * _HALF, 0]
                _load(key_tiles, at, keys_in, key_buffer.index(half))
                _load(value_tiles, at, keys_in, value_buffer.index(half))
            for member in range(group):
                head = key_head * group + member
                for n in range(first * PER, last * PER):
                    i = gl.where(rising, (first + last) * PER - 1 - n, n)
                    entry = entries + i // PER * _FIELDS
                    low = gl.load(entry)
                    high = gl.load(entry + 1)
                    part = i % PER * (4 // PER)
                    inner_start = gl.load(entry + 2 + part * 1)
                    inner_end = gl.load(entry + 3 + part * 1)
                    if PER == 1:
                        inner_start = gl.maximum(inner_start, gl.load(entry + 4))
                        inner_end = gl.minimum(inner_end, gl.load(entry + 5))
                    touched = (low < key_start + _KEYS) & (high > key_start)
                    if touched | (count == 0):
                        stage = step % STAGES
                        ready = queries_in.index(stage)
                        mbarrier.wait(queries_out.index(stage), ((step // STAGES) & 1) ^ 1)
                        mbarrier.expect(ready, SUBS * query_tiles.block_type.nbytes)
                        for sub in gl.static_range(SUBS):
                            _load(
                                query_tiles, [batch, head, i * QUERIES + sub * _HALF, 0], ready,
                                query_buffer.index(stage * SUBS + sub),
                            )  # fmt: skip
                        stage = step & 1
                        ready = grads_in.index(stage)
                        mbarrier.wait(grads_out.index(stage), ((step >> 1) & 1) ^ 1)
                        mbarrier.expect(ready, SUBS * (grad_tiles.block_type.nbytes + TERMS))
                        for sub in gl.static_range(SUBS):
                            query = i * QUERIES + sub * _HALF
                            flat_head = batch * key_heads * group + head
                            to = stage * SUBS + sub
                            _load(grad_tiles, [batch, head, query, 0], ready, grad_buffer.index(to))
                            _load(delta_tiles, [flat_head, query], ready, delta_buffer.index(to))
                            if not SCALED:
                                _load(
                                    level_tiles, [flat_head, query], ready, level_buffer.index(to)
                                )
                        partial = (key_start < inner_start) | (key_start + _KEYS > inner_end)
                        partial = partial | (hole != 0)
                        code = 2 * i + partial.to(gl.int32)
                        code_buffer.index(stage).store(gl.full([1], code, gl.int32, ONE))
                        mbarrier.arrive(ready, count=1)
                        step += 1
            index = gl.atomic_add(counter, 1)
        else:
            index = -1
        turn += 1


@gluon.jit
def writer(
    sum_tiles, buffers, barriers, spans, table, turns, shape, SUBS: gl.constexpr
):  # fmt: skip
    sum_buffer = buffers[9]
    sum_in, sum_out = barriers[6], barriers[7]
    total, key_heads, group, patterns, query_tiles_count = (
        shape[0] * shape[1], shape[3], shape[4], shape[5], shape[6],
    )  # fmt: skip
    QUERIES: gl.constexpr = SUBS * _HALF
    PER: gl.constexpr = _ROWS // QUERIES
    step = 0
    turn = 0
    index = next_item(buffers, barriers, turn, 1)
    while index < total:
        tile, row, rising = place(index, shape)
        batch = row // key_heads
        span = span_of(tile, row, shape, spans)
        first, last, count = span[0], span[1], span[2]
        key_start = tile * _KEYS
        entries = table + gl.minimum(batch, patterns - 1) * query_tiles_count * _FIELDS
        for member in range(group):
            head = row % key_heads * group + member
            own_turns = turns + (batch * key_heads * group + head) * query_tiles_count * PER
            start = gl.where(rising, last - 1, first)
            low = gl.load(entries + start * _FIELDS)
            high = gl.load(entries + start * _FIELDS + 1)
            # The tile whose part is on its way, not known to have arrived.
            sent = -1
            for n in range(first * PER, last * PER):
                i = gl.where(rising, (first + last) * PER - 1 - n, n)
                touched = (low < key_start + _KEYS) & (high > key_start)
                before = gl.where(rising, tile - low // _KEYS, gl.cdiv(high, _KEYS) - 1 - tile)
                following = gl.minimum(n + 1, last * PER - 1)
                following = gl.where(rising, (first + last) * PER - 1 - following, following)
                following = entries + following // PER * _FIELDS
                low = gl.load(following)
                high = gl.load(following + 1)
                if touched:
                    arrived = arrivals(own_turns + i)
                    if (arrived < before) & (sent >= 0):
                        publish(own_turns + sent, "0")
                        sent = -1
                    while arrived < before:
                        arrived = arrivals(own_turns + i)
                    mbarrier.wait(sum_in, step & 1)
                    for part in gl.static_range(2):
                        if QUERIES == 64:
                            at = [batch, head, i * QUERIES, part * 64]
                        else:
                            at = [batch, head, i * QUERIES + part * 64, 0]
                        if before == 0:
                            _store(sum_tiles, at, sum_buffer.index(part))
                        else:
                            _add(sum_tiles, at, sum_buffer.index(part))
                    tma.store_wait(0)
                    mbarrier.arrive(sum_out, count=1)
                    if sent >= 0:
                        publish(own_turns + sent, "2")
                    sent = i
                    step += 1
                elif count == 0:
                    mbarrier.wait(sum_in, step & 1)
                    mbarrier.arrive(sum_out, count=1)
                    step += 1
            if sent >= 0:
                publish(own_turns + sent, "0")
        turn += 1
        index = next_item(buffers, barriers, turn, 1)


@gluon.jit
def weigh(
    scores, key_sum, value_sum, step, before, member, buffers, barriers, item, tensors, limits,
    terms, part: gl.constexpr, SUBS: gl.constexpr, STAGES: gl.constexpr, POWER: gl.constexpr,
    FOLDED: gl.constexpr, SCALED: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """The part of a step that starts with its scores: dPᵀ, dv, dS. Returns the sums for dk and dv.

    Without `FIRST`, `key_sum` is still being added to with the queries of the step before, which are
    released.
    """
    grad_buffer, level_buffer, code_buffer, slope_buffer = (
        buffers[3], buffers[5], buffers[7], buffers[8],
    )  # fmt: skip
    queries_out, grads_in, slope_in = barriers[3], barriers[4], barriers[10]
    gain = tensors[0]
    scale, inverse, single = terms[0], terms[1], terms[2]
    SIZE: gl.constexpr = grad_buffer.shape[4]
    DTYPE: gl.constexpr = grad_buffer.dtype
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = step & 1
    mbarrier.wait(grads_in.index(slot), (step >> 1) & 1)
    grad_weight = bracket(buffers, step, 0, part, SUBS, SCORE)
    if FIRST:
        if SUBS == 2:
            scores = warpgroup_mma_wait(1, deps=[scores[0], scores[1]])
        else:
            scores = (warpgroup_mma_wait(1, deps=[scores[0]]),)
    code = gl.max(code_buffer.index(slot).load(ONE), 0)
    factor = scale
    if gain is not None:
        factor = factor * gl.load(gain + item[5] + member)
    for sub in gl.static_range(SUBS):
        score = scores[sub]
        level = None
        if not SCALED:
            level = level_buffer.index(slot * SUBS + sub).load(SCORE)
        query = ((code >> 1) * SUBS + sub) * _HALF + gl.arange(0, _HALF, gl.SliceLayout(0, SCORE))
        if code & 1:
            score = hide(score, query, item, tensors, limits, SCORE)
        weight, slope = weight_and_slope(score, factor, inverse, level, DTYPE, POWER, FOLDED)
        if gain is not None:
            slope = slope * factor
        value_sum = warpgroup_mma(
            gl.convert_layout(weight, WEIGHT),
            grad_buffer.index(slot * SUBS + sub).reshape([_HALF, SIZE]), value_sum, is_async=True,
        )  # fmt: skip
        if FIRST or sub > 0:
            grad_weight = warpgroup_mma_wait(1, deps=[grad_weight])
        else:
            grad_weight, key_sum = warpgroup_mma_wait(1, deps=[grad_weight, key_sum])
            mbarrier.arrive(queries_out.index(before % STAGES), count=1)
        grad_score = grad_weight
        if sub + 1 < SUBS:
            grad_weight = bracket(buffers, step, sub + 1, part, SUBS, SCORE)
        if single:  # noqa: SIM102 - decided at compile time
            if code & 1:
                # The bracket of a row that sees one key is a difference of two roundings.
                start, end = bounds_of(query, item, tensors, limits)
                grad_score = gl.where((end - start > 1)[None, :], grad_score, 0.0)
        slope_buffer.index((slot * 2 + part) * SUBS + sub).store((slope * grad_score).to(DTYPE))
    fence_async_shared()
    mbarrier.arrive(slope_in.index(slot), count=1)
    return key_sum, value_sum


@gluon.jit
def bracket(
    buffers, step, sub: gl.constexpr, part: gl.constexpr, SUBS: gl.constexpr, SCORE: gl.constexpr
):
    """Starts V·doutᵀ − δ."""
    value_buffer, grad_buffer, delta_buffer = buffers[2], buffers[3], buffers[4]
    SIZE: gl.constexpr = grad_buffer.shape[4]
    place_of = (step & 1) * SUBS + sub
    delta = delta_buffer.index(place_of).load(SCORE)
    return warpgroup_mma(
        value_buffer.index(part + nothing(step)).reshape([_HALF, SIZE]),
        grad_buffer.index(place_of).reshape([_HALF, SIZE]).permute((1, 0)),
        gl.zeros([_HALF, _HALF], gl.float32, SCORE) - delta, is_async=True,
    )  # fmt: skip


@gluon.jit
def scores_of(buffers, step, part: gl.constexpr, SUBS: gl.constexpr, STAGES: gl.constexpr):
    """Starts K·Qᵀ for each 64 queries of a step."""
    query_buffer, key_buffer = buffers[0], buffers[1]
    SIZE: gl.constexpr = key_buffer.shape[4]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zero = gl.zeros([_HALF, _HALF], gl.float32, SCORE)
    keys = key_buffer.index(part + nothing(step)).reshape([_HALF, SIZE])
    start = step % STAGES * SUBS
    first = warpgroup_mma(
        keys, query_buffer.index(start).reshape([_HALF, SIZE]).permute((1, 0)), zero,
        use_acc=False, is_async=True,
    )  # fmt: skip
    if SUBS == 1:
        return (first,)
    else:
        second = warpgroup_mma(
            keys, query_buffer.index(start + 1).reshape([_HALF, SIZE]).permute((1, 0)), zero,
            use_acc=False, is_async=True,
        )  # fmt: skip
        return (first, second)


@gluon.jit
def add_to_keys(
    key_sum, buffers, step, part: gl.constexpr, SUBS: gl.constexpr, STAGES: gl.constexpr
):
    """Starts key_sum + dSᵀ·Q, one product for each 64 queries."""
    query_buffer, slope_buffer = buffers[0], buffers[8]
    SIZE: gl.constexpr = query_buffer.shape[4]
    for sub in gl.static_range(SUBS):
        key_sum = warpgroup_mma(
            slope_buffer.index(((step & 1) * 2 + part) * SUBS + sub),
            query_buffer.index(step % STAGES * SUBS + sub).reshape([_HALF, SIZE]), key_sum,
            is_async=True,
        )  # fmt: skip
    return key_sum


@gluon.jit
def send(query_sum, step, buffers, barriers, part: gl.constexpr):
    """Hands a part of dq to the writer."""
    mbarrier.wait(barriers[7], (step & 1) ^ 1)
    buffers[9].index(part).reshape([64, 64]).store(query_sum)
    fence_async_shared()
    mbarrier.arrive(barriers[6], count=1)


@gluon.jit
def consumer(
    part: gl.constexpr, out_tiles, buffers, barriers, spans, terms, tensors, limits, shape,
    SUBS: gl.constexpr, STAGES: gl.constexpr, POWER: gl.constexpr, FOLDED: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    query_buffer, key_buffer, value_buffer = buffers[0], buffers[1], buffers[2]
    keys_in, keys_out, queries_in, queries_out = barriers[0], barriers[1], barriers[2], barriers[3]
    slope_in, keys_read = barriers[10], barriers[11]
    grad_key_tiles, grad_value_tiles = out_tiles[0], out_tiles[1]
    key_runs = tensors[4]
    tiles, rows, key_heads, group, patterns, query_tiles_count = (
        shape[0], shape[1], shape[3], shape[4], shape[5], shape[6],
    )  # fmt: skip
    total = tiles * rows
    SIZE: gl.constexpr = query_buffer.shape[4]
    DTYPE: gl.constexpr = query_buffer.dtype
    QUERIES: gl.constexpr = SUBS * _HALF
    PER: gl.constexpr = _ROWS // QUERIES
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    step = 0
    turn = 0
    index = next_item(buffers, barriers, turn, 4)
    while index < total:
        item_place = place(index, shape)
        tile, row = item_place[0], item_place[1]
        batch = row // key_heads
        pattern = gl.minimum(batch, patterns - 1)
        each = gl.maximum(span_of(tile, row, shape, spans)[2], 1) * PER
        first_key, last_key = tile * 0, limits[3]
        if key_runs is not None:
            runs = key_runs + gl.minimum(batch, terms[5] - 1) * 3
            first_key, last_key = gl.load(runs), gl.load(runs + 1)
        item = (
            tile * _KEYS + part * _HALF, pattern * (query_tiles_count * _ROWS), first_key, last_key,
            batch.to(gl.int64) * terms[4], row % key_heads * group,
        )  # fmt: skip
        key_sum = gl.zeros([_HALF, SIZE], gl.float32, SUM)
        no_value_sum = gl.zeros([_HALF, SIZE], gl.float32, SUM)

        mbarrier.wait(keys_in, turn & 1)
        mbarrier.wait(queries_in.index(step % STAGES), (step // STAGES) & 1)
        key_sum, value_sum = weigh(
            scores_of(buffers, step, part, SUBS, STAGES), key_sum, no_value_sum, step, step, 0,
            buffers, barriers, item, tensors, limits, terms,
            part, SUBS, STAGES, POWER, FOLDED, SCALED, True,
        )  # fmt: skip
        step += 1
        for position in range(1, each * group):
            before = step - 1
            mbarrier.wait(queries_in.index(step % STAGES), (step // STAGES) & 1)
            scores = scores_of(buffers, step, part, SUBS, STAGES)
            settled = warpgroup_mma_wait(SUBS, deps=[value_sum])
            mbarrier.arrive(barriers[5].index(before & 1), count=1)
            mbarrier.wait(slope_in.index(before & 1), (before >> 1) & 1)
            query_sum = query_part(buffers, before, part, SUBS)
            key_sum = add_to_keys(key_sum, buffers, before, part, SUBS, STAGES)
            if SUBS == 2:
                first_score, second_score, query_sum = warpgroup_mma_wait(
                    SUBS, deps=[scores[0], scores[1], query_sum]
                )
                known = (first_score, second_score)
            else:
                first_score, query_sum = warpgroup_mma_wait(SUBS, deps=[scores[0], query_sum])
                known = (first_score,)  # type: ignore[assignment]
            send(query_sum, before, buffers, barriers, part)
            key_sum, value_sum = weigh(
                known, key_sum, settled, step, before, position // each, buffers, barriers,
                item, tensors, limits, terms, part, SUBS, STAGES, POWER, FOLDED, SCALED, False,
            )  # fmt: skip
            step += 1

        before = step - 1
        value_total = warpgroup_mma_wait(0, deps=[value_sum])
        mbarrier.arrive(barriers[5].index(before & 1), count=1)
        mbarrier.wait(slope_in.index(before & 1), (before >> 1) & 1)
        query_sum = query_part(buffers, before, part, SUBS)
        key_sum = add_to_keys(key_sum, buffers, before, part, SUBS, STAGES)
        query_sum = warpgroup_mma_wait(SUBS, deps=[query_sum])
        mbarrier.arrive(keys_read, count=1)
        send(query_sum, before, buffers, barriers, part)
        value_buffer.index(part).reshape([_HALF, SIZE]).store(value_total.to(DTYPE))
        key_sum = warpgroup_mma_wait(0, deps=[key_sum])
        mbarrier.arrive(queries_out.index(before % STAGES), count=1)
        # The other consumer multiplies by these keys for dq.
        mbarrier.wait(keys_read, turn & 1)
        key_buffer.index(part).reshape([_HALF, SIZE]).store((key_sum * terms[3]).to(DTYPE))
        fence_async_shared()
        at = [batch, row % key_heads, tile * _KEYS + part * _HALF, 0]
        _store(grad_value_tiles, at, value_buffer.index(part))
        _store(grad_key_tiles, at, key_buffer.index(part))
        tma.store_wait(0)
        mbarrier.arrive(keys_out, count=1)
        turn += 1
        index = next_item(buffers, barriers, turn, 4)


@gluon.jit
def query_part(buffers, step, part: gl.constexpr, SUBS: gl.constexpr):
    """This consumer's part of dq, [64, 64]: half of the queries or of the size, of all 128 keys."""
    key_buffer, slope_buffer = buffers[1], buffers[8]
    SIZE: gl.constexpr = key_buffer.shape[4]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    query_sum = gl.zeros([64, 64], gl.float32, LAYOUT)
    for half in gl.static_range(2):
        keys = key_buffer.index(half + nothing(step)).reshape([_HALF, SIZE])
        slope = ((step & 1) * 2 + half) * SUBS + part * (SUBS - 1)
        query_sum = warpgroup_mma(
            slope_buffer.index(slope).permute((1, 0)),
            keys.slice(part * (SIZE - 64), 64, dim=1),
            query_sum, use_acc=half > 0, is_async=True,
        )  # fmt: skip
    return query_sum


@gluon.jit(
    do_not_specialize=[
        "tiles", "rows", "band", "key_heads", "group", "patterns", "query_tiles_count",
        "span_patterns", "offset",
        "left", "right", "last_key",
    ]
)  # fmt: skip
def backward_kernel(
    query_tiles, key_tiles, value_tiles, grad_tiles, delta_tiles, level_tiles, sum_tiles,
    grad_key_tiles, grad_value_tiles,
    spans, table, counter, turns,
    gain, starts, ends, shown, key_runs,
    scale, inverse, final, shown_batch, shown_patterns,
    tiles, rows, band, key_heads, group, patterns, query_tiles_count, span_patterns,
    offset, left, right, last_key,
    SUBS: gl.constexpr, STAGES: gl.constexpr, POWER: gl.constexpr, FOLDED: gl.constexpr,
    SCALED: gl.constexpr, SINGLE: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = query_tiles.dtype
    SIZE: gl.constexpr = query_tiles.block_shape[3]
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    query_buffer = gl.allocate_shared_memory(
        DTYPE, [STAGES * SUBS, 1, 1, 64, SIZE], query_tiles.layout
    )
    grad_buffer = gl.allocate_shared_memory(DTYPE, [2 * SUBS, 1, 1, 64, SIZE], grad_tiles.layout)
    key_buffer = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, SIZE], key_tiles.layout)
    value_buffer = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, SIZE], value_tiles.layout)
    slope_buffer = gl.allocate_shared_memory(DTYPE, [4 * SUBS, 64, 64], SQUARE)
    sum_buffer = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, 64], sum_tiles.layout)
    delta_buffer = gl.allocate_shared_memory(gl.float32, [2 * SUBS, 1, 64], delta_tiles.layout)
    level_buffer = delta_buffer
    if not SCALED:
        level_buffer = gl.allocate_shared_memory(gl.float32, [2 * SUBS, 1, 64], level_tiles.layout)
    index_buffer = gl.allocate_shared_memory(gl.int32, [2, 1], PLAIN)
    code_buffer = gl.allocate_shared_memory(gl.int32, [2, 1], PLAIN)
    keys_in = gl.allocate_shared_memory(gl.int64, [1], BAR)
    keys_out = gl.allocate_shared_memory(gl.int64, [1], BAR)
    keys_read = gl.allocate_shared_memory(gl.int64, [1], BAR)
    sum_in = gl.allocate_shared_memory(gl.int64, [1], BAR)
    sum_out = gl.allocate_shared_memory(gl.int64, [1], BAR)
    queries_in = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    queries_out = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    grads_in = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    grads_out = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    index_in = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    index_out = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    slope_in = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    mbarrier.init(keys_in, count=1)
    mbarrier.init(keys_out, count=2)
    mbarrier.init(keys_read, count=2)
    mbarrier.init(sum_in, count=2)
    mbarrier.init(sum_out, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(queries_in.index(i), count=1)
        mbarrier.init(queries_out.index(i), count=2)
    for i in gl.static_range(2):
        # One arrival for the copies, one for the code.
        mbarrier.init(grads_in.index(i), count=2)
        mbarrier.init(grads_out.index(i), count=2)
        mbarrier.init(index_in.index(i), count=1)
        mbarrier.init(index_out.index(i), count=3)
        mbarrier.init(slope_in.index(i), count=2)
    fence_async_shared()
    descriptors = (query_tiles, key_tiles, value_tiles, grad_tiles, delta_tiles, level_tiles)
    buffers = (
        query_buffer, key_buffer, value_buffer, grad_buffer, delta_buffer, level_buffer,
        index_buffer, code_buffer, slope_buffer, sum_buffer,
    )  # fmt: skip
    barriers = (
        keys_in, keys_out, queries_in, queries_out, grads_in, grads_out, sum_in, sum_out,
        index_in, index_out, slope_in, keys_read,
    )  # fmt: skip
    shape = (tiles, rows, band, key_heads, group, patterns, query_tiles_count, span_patterns)
    terms = (scale, inverse, SINGLE, final, shown_batch, shown_patterns)
    tensors = (gain, starts, ends, shown, key_runs)
    limits = (offset, left, right, last_key)
    out_tiles = (grad_key_tiles, grad_value_tiles)
    gl.warp_specialize(
        [
            (consumer, (0, out_tiles, buffers, barriers, spans, terms, tensors, limits, shape,
                        SUBS, STAGES, POWER, FOLDED, SCALED)),
            (consumer, (1, out_tiles, buffers, barriers, spans, terms, tensors, limits, shape,
                        SUBS, STAGES, POWER, FOLDED, SCALED)),
            (producer, (descriptors, buffers, barriers, spans, table, counter, shape,
                        SUBS, STAGES, SCALED)),
            (writer, (sum_tiles, buffers, barriers, spans, table, turns, shape, SUBS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
