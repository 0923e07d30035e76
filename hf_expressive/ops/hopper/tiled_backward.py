"""The backward kernel for Hopper GPUs, in Gluon: five products a tile, additions in a fixed order.

With P the weights, slope = g' and δ as in `ops.triton.gradient`, a program takes a tile of 128 keys of
one head, keeps dk and dv in registers and steps through the queries that see some of the keys:

    Sᵀ = K·Qᵀ    dPᵀ = V·doutᵀ − δ    dv += Pᵀ·dout    dSᵀ = slope · dPᵀ    dk += dSᵀ·Q    dq = dS·K

Two consumer warp groups own 64 of the keys each; P stays in registers, dS goes through shared memory,
because dq needs all 128 keys. A step works on two tiles of 64 queries, so that the product units always
have something before them while the consumers do something else:

    dPᵀ of this tile
    Sᵀ of the next tile                      while dS of this one is computed and stored
    dq and dk of this tile                   while weights and slopes of the next are computed
    dv of the next tile                      while dq is stored for the writer

Of what is under way where a step ends, dv, nothing is read in the next one: the assembler would
otherwise let all products run one by one.

At head size 64 there are registers to spare (`ROOMY`): slopes stay float32 until dPᵀ is there, Kᵀ
stays in registers for dqᵀ = Kᵀ·dSᵀ, and dq has two places in shared memory, so that it is handed over
with dS, by one fence and barrier for both.

A writer warp adds dq to a float32 sum in global memory by bulk copies. A tile of queries receives the
parts of its keys in the order in which programs take the tiles of keys from a counter (`place`), mostly
from the last keys to the first; a counter a tile of queries says whose turn it is. So a program only
waits for one that started earlier, and with causality, where later keys also begin with later queries,
the turns come round by themselves.

Where several query heads share a key/value head, a program steps through all of them, or, where their
rows would not stay in the L2 cache until other programs want them, through one: then dk and dv are
float32 sums as well, to which query heads add in order.
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
    add_tile,
    arrivals,
    as_floats,
    complete,
    halves,
    lane_sums,
    load_tile,
    nothing,
    number,
    packed,
    products,
    publish,
    reciprocal,
    settled,
    store_tile,
)
from .plan import ROWS
from .work import band_of, entries_of, place_in_bands, seen_by_all, seen_by_any

_ROWS = gl.constexpr(ROWS)
#: Keys of a tile.
_KEYS = gl.constexpr(128)


@gluon.jit
def weight_and_slope(
    score, factor, inverse, GAIN: gl.constexpr, POWER: gl.constexpr, FOLDED: gl.constexpr
):
    """g and g' without its constant, of z = factor · score; see `tiled_forward`."""
    if not FOLDED:
        score = score * factor
    if POWER == 0:
        slope = score
        if GAIN:
            slope = slope * factor
        return score * score + inverse, slope
    root = score
    if POWER == 2:
        root = gl.minimum(score * score, 1e18)
    # g = root² / (root² + inverse) and g' ∝ g / (score · (root² + inverse)) share a factor.
    rest = reciprocal(root * root + inverse)
    slope = root * rest
    weight = root * slope
    if POWER == 2:
        slope = slope * score
    slope = slope * rest
    if GAIN:
        slope = slope * factor
    return weight, slope


@gluon.jit
def bounds_of(query, item, tensors, limits):
    """[start, end) of the keys that queries see."""
    gain, starts, ends, keys, keys_batch = tensors
    first_key, bounds, first_head, batch = item
    if starts is None:
        start, end = band_of(query, limits)
    else:
        start = gl.load(starts + bounds + query)
        end = gl.load(ends + bounds + query)
    return start, end


@gluon.jit
def visible_in(query, item, tensors, limits, SCORE: gl.constexpr):
    """Which queries see which keys of a tile."""
    start, end = bounds_of(query, item, tensors, limits)
    gain, starts, ends, keys, keys_batch = tensors
    first_key, bounds, first_head, batch = item
    key = first_key + gl.arange(0, _KEYS, gl.SliceLayout(1, SCORE))
    visible = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
    if keys is not None:
        offset, left, right, num_keys = limits
        place = keys + batch.to(gl.int64) * keys_batch + key
        visible = visible & (gl.load(place, mask=key < num_keys, other=0) != 0)[:, None]
    return visible


@gluon.jit
def sweep_of(position, shape):
    """(first position, how many, whether turned round) of the sweep of a position.

    In a sweep over a row each program takes one tile. Under causality items become longer as they begin
    with earlier queries, so that programs drift apart by two steps a tile with each sweep, until the L2
    cache does not hold the queries between the first and the last of them. Every second sweep, from the
    third on, takes its tiles in the opposite order, which brings programs together again.
    """
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    number_of_sweep = position // sweep
    first = number_of_sweep * sweep
    is_turned = (number_of_sweep > 1) & (number_of_sweep % 2 == 0)
    return first, gl.minimum(sweep, tiles - first), is_turned


@gluon.jit
def place(index, shape):
    """(tile of keys, row, rising) of a work item: band by band of rows, see `heads_of`.

    A band starts with its last keys and steps through queries upwards. The last one, of `tail` heads, is
    `rising`: it starts with its first keys and steps downwards, so that with causality the short items
    end the work.
    """
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    position, row, rising = place_in_bands(index, tiles, rows, band, tail)
    first, count, is_turned = sweep_of(position, shape)
    falling = gl.where(is_turned, 2 * first + count - 1 - position, position)
    return gl.where(rising, position, tiles - 1 - falling), row, rising


@gluon.jit
def order_of(tile, rising, shape):
    """(highest, lowest, whether upwards) of the tiles of keys among which this one has its turn.

    Those of higher keys all have theirs before.
    """
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    first, count, is_turned = sweep_of(tiles - 1 - tile, shape)
    highest = gl.where(rising, tiles, tiles - first) - 1
    lowest = gl.where(rising, 0, highest + 1 - count)
    return highest, lowest, rising | is_turned


@gluon.jit
def turns_before(tile, low, high, order):
    """How many tiles of keys add to a tile of queries before this one, if it sees keys [low, high)."""
    highest, lowest, is_upward = order
    last = gl.cdiv(high, _KEYS) - 1
    upward = gl.maximum(last - highest, 0) + tile - gl.maximum(low // _KEYS, lowest)
    return gl.where(is_upward, upward, last - tile)


@gluon.jit
def heads_of(row, shape):
    """(key/value head of B · K, first query head of B · H) of a row.

    A row is a key/value head with a part of its query heads: with all of them where `share` is 1; else
    first come all key/value heads with the first of `share` parts, then all with the second.
    """
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    key_rows = rows // share
    key_row = row % key_rows
    return key_row, (key_row * share + row // key_rows) * group


@gluon.jit
def span_of(tile, key_row, shape, spans, limits):
    """(first plan tile, one past the last, how many) of those that see some of the keys."""
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    if spans is None:
        offset, left, right, num_keys = limits
        start = tile * _KEYS
        first = gl.maximum(start - (offset + right - 1), 0) // _ROWS
        last = gl.minimum(start + (_KEYS - 1 + left - 1 - offset), num_keys - offset - 1)
        count = gl.where(last >= 0, gl.maximum(last // _ROWS + 1 - first, 0), 0)
        last = first + count
    else:
        entry = spans + (gl.minimum(key_row // key_heads, patterns - 1) * tiles + tile) * 3
        first = gl.load(entry)
        last = gl.load(entry + 1)
        count = gl.load(entry + 2)
    return first, last, count


@gluon.jit
def following_item(counter, spans, shape, limits):
    """The next work item that no program has taken yet and whose keys some query sees, or one past the
    last; `gradient.clear_kernel` writes the others' gradients."""
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    total = tiles * rows
    index = gl.atomic_add(counter, 1)
    tile, row, rising = place(gl.minimum(index, total - 1), shape)
    first, last, count = span_of(tile, heads_of(row, shape)[0], shape, spans, limits)
    while (count == 0) & (index < total):
        index = gl.atomic_add(counter, 1)
        tile, row, rising = place(gl.minimum(index, total - 1), shape)
        first, last, count = span_of(tile, heads_of(row, shape)[0], shape, spans, limits)
    return index


@gluon.jit
def next_item(index_buffer, index_in, index_out, turn, WARPS: gl.constexpr):
    """What the producer has published for this turn."""
    slot = turn & 1
    mbarrier.wait(index_in.index(slot), (turn >> 1) & 1)
    index = number(index_buffer, slot, WARPS)
    mbarrier.arrive(index_out.index(slot), count=1)
    return index


@gluon.jit
def producer(
    descriptors, buffers, barriers, spans, table, counter, shape, limits,
    STAGES: gl.constexpr,
):  # fmt: skip
    query_tiles, key_tiles, value_tiles, grad_tiles, delta_tiles = descriptors
    (
        query_buffer, key_buffer, value_buffer, grad_buffer, delta_buffer, index_buffer,
        code_buffer, slope_buffer, sum_buffer, key_staging,
    ) = buffers  # fmt: skip
    (
        keys_in, keys_out, values_in, values_out, rows_in, rows_out,
        sum_in, sum_out, keys_added, index_in, index_out,
    ) = barriers  # fmt: skip
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    total = tiles * rows
    QUERIES: gl.constexpr = query_tiles.block_shape[2]
    PER: gl.constexpr = _ROWS // QUERIES
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ROW_BYTES: gl.constexpr = (
        query_tiles.block_type.nbytes + grad_tiles.block_type.nbytes + delta_tiles.block_type.nbytes
    )
    step = 0
    turn = 0
    index = following_item(counter, spans, shape, limits)
    while index >= 0:
        slot = turn & 1
        mbarrier.wait(index_out.index(slot), ((turn >> 1) & 1) ^ 1)
        index_buffer.index(slot).store(gl.full([1], index, gl.int32, ONE))
        mbarrier.arrive(index_in.index(slot), count=1)
        if index < total:
            tile, row, rising = place(index, shape)
            key_row, first_head = heads_of(row, shape)
            batch = key_row // key_heads
            key_head = key_row % key_heads
            first, last, count = span_of(tile, key_row, shape, spans, limits)
            key_start = tile * _KEYS
            entries = entries_of(batch, table, patterns, query_tiles_count)
            mbarrier.wait(keys_out, (turn & 1) ^ 1)
            mbarrier.expect(keys_in, key_tiles.block_type.nbytes)
            load_tile(key_tiles, [batch, key_head, key_start, 0], keys_in, key_buffer.index(0))
            has_values = 0
            for member in range(group):
                flat_head = first_head + member
                head = flat_head % (key_heads * share * group)
                for n in range(first * PER, last * PER):
                    i = gl.where(rising, (first + last) * PER - 1 - n, n)
                    low, high = seen_by_any(i // PER, entries, limits)
                    inner_start, inner_end = seen_by_all(i, entries, limits)
                    touched = (low < key_start + _KEYS) & (high > key_start)
                    if touched:
                        stage = step % STAGES
                        ready = rows_in.index(stage)
                        mbarrier.wait(rows_out.index(stage), ((step // STAGES) & 1) ^ 1)
                        mbarrier.expect(ready, ROW_BYTES)
                        query = i * QUERIES
                        at = [batch, head, query, 0]
                        load_tile(query_tiles, at, ready, query_buffer.index(stage))
                        load_tile(grad_tiles, at, ready, grad_buffer.index(stage))
                        load_tile(delta_tiles, [flat_head, query], ready, delta_buffer.index(stage))
                        partial = (key_start < inner_start) | (key_start + _KEYS > inner_end)
                        code = 2 * i + partial.to(gl.int32)
                        code_buffer.index(stage).store(gl.full([1], code, gl.int32, ONE))
                        mbarrier.arrive(ready, count=1)
                        step += 1
                        if has_values == 0:
                            # They are needed later than keys and queries, and their place is free later.
                            has_values += 1
                            mbarrier.wait(values_out, (turn & 1) ^ 1)
                            mbarrier.expect(values_in, value_tiles.block_type.nbytes)
                            at = [batch, key_head, key_start, 0]
                            load_tile(value_tiles, at, values_in, value_buffer.index(0))
            index = following_item(counter, spans, shape, limits)
        else:
            index = -1
        turn += 1


@gluon.jit
def hand_over(sums, at, staging, is_first):
    """Starts to add a tile to a sum, or to write it."""
    if is_first:
        store_tile(sums, at, staging)
    else:
        add_tile(sums, at, staging)


@gluon.jit
def writer(
    sum_tiles, key_turns, buffers, barriers, spans, table, turns, shape, limits,
    QUERIES: gl.constexpr,
):  # fmt: skip
    (
        query_buffer, key_buffer, value_buffer, grad_buffer, delta_buffer, index_buffer,
        code_buffer, slope_buffer, sum_buffer, key_staging,
    ) = buffers  # fmt: skip
    (
        keys_in, keys_out, values_in, values_out, rows_in, rows_out,
        sum_in, sum_out, keys_added, index_in, index_out,
    ) = barriers  # fmt: skip
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    total = tiles * rows
    PER: gl.constexpr = _ROWS // QUERIES
    PLACES: gl.constexpr = sum_buffer.shape[0]
    step = 0
    turn = 0
    key_turn = 0
    index = next_item(index_buffer, index_in, index_out, turn, 1)
    while index < total:
        tile, row, rising = place(index, shape)
        key_row, first_head = heads_of(row, shape)
        batch = key_row // key_heads
        first, last, count = span_of(tile, key_row, shape, spans, limits)
        key_start = tile * _KEYS
        entries = entries_of(batch, table, patterns, query_tiles_count)
        order = order_of(tile, rising, shape)
        if key_turns is not None:
            if turn > 0:
                mbarrier.wait(keys_added, (turn & 1) ^ 1)
                publish(key_turns + key_turn, "0")
            key_turn = key_row * tiles + tile
        for member in range(group):
            flat_head = first_head + member
            own_turns = turns + flat_head * query_tiles_count * PER
            start = gl.where(rising, last - 1, first)
            low, high = seen_by_any(start, entries, limits)
            before = turns_before(tile, low, high, order)
            arrived = arrivals(own_turns + gl.where(rising, last * PER - 1, first * PER))
            # The tile whose part is on its way, not known to have arrived.
            sent = -1
            for n in range(first * PER, last * PER):
                i = gl.where(rising, (first + last) * PER - 1 - n, n)
                touched = (low < key_start + _KEYS) & (high > key_start)
                if touched:
                    if (arrived < before) & (sent >= 0):
                        publish(own_turns + sent, "0")
                        sent = -1
                    while arrived < before:
                        arrived = arrivals(own_turns + i)
                    own_sum = step % PLACES
                    mbarrier.wait(sum_in.index(own_sum), (step // PLACES) & 1)
                    at = [flat_head, i * sum_tiles.block_shape[1], 0]
                    hand_over(sum_tiles, at, sum_buffer.index(own_sum), before == 0)
                    tma.store_wait(0)
                    mbarrier.arrive(sum_out.index(own_sum), count=1)
                    if sent >= 0:
                        publish(own_turns + sent, "1")
                    sent = i
                    step += 1
                following = gl.minimum(n + 1, last * PER - 1)
                following = gl.where(rising, (first + last) * PER - 1 - following, following)
                low, high = seen_by_any(following // PER, entries, limits)
                before = turns_before(tile, low, high, order)
                arrived = arrivals(own_turns + following)
            if sent >= 0:
                publish(own_turns + sent, "0")
        turn += 1
        index = next_item(index_buffer, index_in, index_out, turn, 1)
    if key_turns is not None:  # noqa: SIM102 - decided at compile time
        if turn > 0:
            mbarrier.wait(keys_added, (turn & 1) ^ 1)
            publish(key_turns + key_turn, "0")


@gluon.jit
def code_of(code_buffer, stage):
    """Twice the tile of queries, and one more if keys are hidden from some of them."""
    return number(code_buffer, stage, 8)


@gluon.jit
def delta_of(delta_buffer, stage):
    """−δ of the queries of a step."""
    QUERIES: gl.constexpr = delta_buffer.shape[2]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, QUERIES, 16])
    return delta_buffer.index(stage).reshape([QUERIES]).load(gl.SliceLayout(0, SCORE))


@gluon.jit
def scores_of(query_buffer, key_buffer, stage, step):
    """Starts K·Qᵀ."""
    QUERIES: gl.constexpr = query_buffer.shape[3]
    SIZE: gl.constexpr = query_buffer.shape[4]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, QUERIES, 16])
    queries = query_buffer.index(stage).reshape([QUERIES, SIZE])
    return warpgroup_mma(
        key_buffer.index(nothing(step)).reshape([_KEYS, SIZE]), queries.permute((1, 0)),
        gl.zeros([_KEYS, QUERIES], gl.float32, SCORE), use_acc=False, is_async=True,
    )  # fmt: skip


@gluon.jit
def bracket_of(delta, value_buffer, grad_buffer, stage, step):
    """Starts V·doutᵀ − δ."""
    QUERIES: gl.constexpr = grad_buffer.shape[3]
    SIZE: gl.constexpr = value_buffer.shape[4]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, QUERIES, 16])
    grads = grad_buffer.index(stage).reshape([QUERIES, SIZE])
    return warpgroup_mma(
        value_buffer.index(nothing(step)).reshape([_KEYS, SIZE]), grads.permute((1, 0)),
        gl.zeros([_KEYS, QUERIES], gl.float32, SCORE) + delta[None, :], is_async=True,
    )  # fmt: skip


@gluon.jit
def weigh(
    score, factors, code, member, item, terms, tensors, limits,
    POWER: gl.constexpr, FOLDED: gl.constexpr, ROOMY: gl.constexpr,
):  # fmt: skip
    """Weights, as an operand and without the factors of the keys, and slopes of a step, float32 or
    `packed`."""
    QUERIES: gl.constexpr = score.shape[1]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, QUERIES, 16])
    gain, starts, ends, keys, keys_batch = tensors
    factor, inverse, final = terms
    first_key, bounds, first_head, batch = item
    if gain is not None:
        factor = factor * gl.load(gain + first_head + member)
    query = (code >> 1) * QUERIES + gl.arange(0, QUERIES, gl.SliceLayout(0, SCORE))
    if POWER > 0:  # noqa: SIM102 - decided at compile time
        if code & 1:  # weight and slope of score 0 are 0
            score = gl.where(visible_in(query, item, tensors, limits, SCORE), score, 0.0)
    weight, slope = weight_and_slope(score, factor, inverse, gain is not None, POWER, FOLDED)
    if POWER > 0:
        weight = weight.to(gl.bfloat16)
        slopes = settled(slope) if ROOMY else packed(slope)
    else:
        if factors is not None:
            slope = slope * factors[:, None]
        # Hidden as pairs: registers do not hold both of them as float32.
        weights = packed(weight)
        slopes = packed(slope)
        if code & 1:
            visible = gl.where(visible_in(query, item, tensors, limits, SCORE), -1, 0)
            low, high = gl.split(visible.reshape([_KEYS, QUERIES // 2, 2]))
            shown = (low & 65535) | (high & -65536)
            weights = weights & shown
            slopes = slopes & shown
        weight = halves(weights, SCORE)
    return weight, slopes


@gluon.jit
def add_to_values(value_sum, weight, grad_buffer, stage):
    """Starts value_sum + Pᵀ·dout."""
    QUERIES: gl.constexpr = grad_buffer.shape[3]
    SIZE: gl.constexpr = grad_buffer.shape[4]
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, SIZE, 16])
    return warpgroup_mma(
        gl.convert_layout(weight, gl.DotOperandLayout(0, SUM, 2)),
        grad_buffer.index(stage).reshape([QUERIES, SIZE]), value_sum, is_async=True,
    )  # fmt: skip


@gluon.jit
def store_slope(
    bracket, slope, bracket_sum, code, slope_buffer, step, item, tensors, limits,
    SINGLE: gl.constexpr, BIASED: gl.constexpr,
):  # fmt: skip
    """dSᵀ to shared memory, fenced: after the next barrier both warp groups may multiply by it.

    Returns:
        `bracket_sum`, with `BIASED` raised by the sum of what each key's brackets are over the queries
        that see it, within each thread: (keys, 4).
    """
    QUERIES: gl.constexpr = bracket.shape[1]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, QUERIES, 16])
    if SINGLE or BIASED:  # noqa: SIM102 - decided at compile time
        if code & 1:
            query = (code >> 1) * QUERIES + gl.arange(0, QUERIES, gl.SliceLayout(0, SCORE))
            if SINGLE:
                # The bracket of a row that sees one key is a difference of two roundings.
                start, end = bounds_of(query, item, tensors, limits)
                bracket = gl.where((end - start > 1)[None, :], bracket, 0.0)
            if BIASED:
                bracket = gl.where(visible_in(query, item, tensors, limits, SCORE), bracket, 0.0)
    if BIASED:
        bracket_sum = bracket_sum + lane_sums(bracket, _KEYS, QUERIES)
    if slope.dtype == gl.float32:
        slope = (slope * bracket).to(gl.bfloat16)
    else:
        slope = halves(products(slope, packed(bracket)), SCORE)
    slope_buffer.index(step & 1).store(slope)
    fence_async_shared()
    return bracket_sum


@gluon.jit
def turned_keys(key_buffer):
    """Kᵀ as an operand of `part_of_queries`."""
    SIZE: gl.constexpr = key_buffer.shape[4]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, SIZE // 2, 16])
    keys = key_buffer.index(0).reshape([_KEYS, SIZE])
    return keys.permute((1, 0)).load(gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def part_of_queries(turned, slope_buffer, key_buffer, step):
    """Starts dS·K, of which each warp group computes half of the columns, or with `turned_keys` the
    transpose, of which it computes half of the queries."""
    QUERIES: gl.constexpr = slope_buffer.shape[2]
    SIZE: gl.constexpr = key_buffer.shape[4]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, SIZE // 2, 16])
    slopes = slope_buffer.index(step & 1)
    nothing_yet = gl.zeros([QUERIES, SIZE], gl.float32, LAYOUT)
    if turned is not None:
        part = warpgroup_mma(turned, slopes, nothing_yet, use_acc=False, is_async=True)
    else:
        keys = key_buffer.index(nothing(step)).reshape([_KEYS, SIZE])
        part = warpgroup_mma(
            slopes.permute((1, 0)), keys, nothing_yet, use_acc=False, is_async=True
        )
    return part


@gluon.jit
def add_to_keys(key_sum, slope_buffer, query_buffer, stage, step):
    """Starts key_sum + dSᵀ·Q."""
    QUERIES: gl.constexpr = query_buffer.shape[3]
    SIZE: gl.constexpr = query_buffer.shape[4]
    queries = query_buffer.index(stage).reshape([QUERIES, SIZE])
    return warpgroup_mma(slope_buffer.index(step & 1), queries, key_sum, is_async=True)


@gluon.jit
def store_part(query_part, sum_buffer):
    """dq of a step to shared memory, in an order in which a thread writes 16 bytes at a time.

    Of the 64 rows (4 warps, 2, 8 in lanes) and half of the columns (4 or 8, 4 in lanes, 2) of a warp
    group the two rows and two columns come to lie beside each other; `finish_kernel` undoes it.
    """
    SIZE: gl.constexpr = query_part.shape[1]
    split = query_part.reshape([1, 4, 2, 4, 2, 2, SIZE // 64, 4, 4, 2])
    shuffled = split.permute((0, 5, 7, 1, 3, 6, 4, 8, 2, 9)).reshape([1, SIZE, 64])
    sum_buffer.store(shuffled)


@gluon.jit
def sides(x):
    """The left and the right half of the columns."""
    SIZE: gl.constexpr = x.shape[1]
    return gl.split(x.reshape([x.shape[0], 2, SIZE // 2]).permute((0, 2, 1)))


@gluon.jit
def consumer(
    out_tiles, key_turns, key_terms, buffers, barriers, spans, terms, tensors, limits, shape,
    STAGES: gl.constexpr, POWER: gl.constexpr, FOLDED: gl.constexpr, SINGLE: gl.constexpr,
    ROOMY: gl.constexpr,
):  # fmt: skip
    (
        query_buffer, key_buffer, value_buffer, grad_buffer, delta_buffer, index_buffer,
        code_buffer, slope_buffer, sum_buffer, key_staging,
    ) = buffers  # fmt: skip
    (
        keys_in, keys_out, values_in, values_out, rows_in, rows_out,
        sum_in, sum_out, keys_added, index_in, index_out,
    ) = barriers  # fmt: skip
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count = shape
    grad_key_tiles, grad_value_tiles = out_tiles
    key_factors, grad_key_bias = key_terms
    scale, inverse, final = terms
    gain, starts, ends, keys, keys_batch = tensors
    offset, left, right, num_keys = limits
    QUERIES: gl.constexpr = query_buffer.shape[3]
    SIZE: gl.constexpr = query_buffer.shape[4]
    VALUE_SIZE: gl.constexpr = value_buffer.shape[4]
    PER: gl.constexpr = _ROWS // QUERIES
    BIASED: gl.constexpr = grad_key_bias is not None
    PLACES: gl.constexpr = sum_buffer.shape[0]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, QUERIES, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, SIZE, 16])
    VALUE_SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, VALUE_SIZE, 16])
    KEY: gl.constexpr = gl.SliceLayout(1, SCORE)
    step = 0
    turn = 0
    index = next_item(index_buffer, index_in, index_out, turn, 8)
    while index < tiles * rows:
        tile, row, rising = place(index, shape)
        key_row, first_head = heads_of(row, shape)
        batch = key_row // key_heads
        pattern = gl.minimum(batch, patterns - 1)
        each = span_of(tile, key_row, shape, spans, limits)[2] * PER
        first_head %= key_heads * share * group
        item = (tile * _KEYS, pattern * (query_tiles_count * _ROWS), first_head, batch)
        key_sum = gl.zeros([_KEYS, SIZE], gl.float32, SUM)
        bracket_sum = lane_sums(gl.zeros([_KEYS, QUERIES], gl.float32, SCORE), _KEYS, QUERIES)
        factors = key_factors
        if key_factors is not None:
            key = tile * _KEYS + gl.arange(0, _KEYS, KEY)
            key_place = key_row.to(gl.int64) * num_keys + key
            factors = gl.load(key_factors + key_place, mask=key < num_keys, other=0.0)

        mbarrier.wait(keys_in, turn & 1)
        turned = None
        if ROOMY:
            turned = turned_keys(key_buffer)
        stage = step % STAGES
        mbarrier.wait(rows_in.index(stage), (step // STAGES) & 1)
        score = warpgroup_mma_wait(0, deps=[scores_of(query_buffer, key_buffer, stage, step)])
        code = code_of(code_buffer, stage)
        weight, slope = weigh(
            score, factors, code, 0, item, terms, tensors, limits, POWER, FOLDED, ROOMY
        )
        no_values = gl.zeros([_KEYS, VALUE_SIZE], gl.float32, VALUE_SUM)
        value_sum = add_to_values(no_values, weight, grad_buffer, stage)
        delta = delta_of(delta_buffer, stage)
        value_sum = warpgroup_mma_wait(1, deps=[value_sum])
        mbarrier.wait(values_in, turn & 1)
        if key_turns is not None:
            # What the item before has added is in global memory by now.
            complete()
            mbarrier.arrive(keys_added, count=1, pred=turn > 0)
        for position in range(1, each * group):
            bracket = bracket_of(delta, value_buffer, grad_buffer, stage, step)
            # dq of the step before is handed over only here, behind a product: a fence takes its time.
            # With two places that can wait for the fence of dS.
            if PLACES == 1:
                fence_async_shared()
                mbarrier.arrive(sum_in.index(0), count=1, pred=position > 1)
            value_sum = warpgroup_mma_wait(1, deps=[value_sum])
            following = (step + 1) % STAGES
            mbarrier.wait(rows_in.index(following), ((step + 1) // STAGES) & 1)
            score = scores_of(query_buffer, key_buffer, following, step)
            bracket = warpgroup_mma_wait(1, deps=[bracket])
            bracket_sum = store_slope(
                bracket, slope, bracket_sum, code, slope_buffer, step, item, tensors, limits,
                SINGLE, BIASED,
            )  # fmt: skip
            if PLACES == 2:
                mbarrier.arrive(sum_in.index((step - 1) & 1), count=1, pred=position > 1)
            code = code_of(code_buffer, following)
            query_part = part_of_queries(turned, slope_buffer, key_buffer, step)
            key_part = add_to_keys(key_sum, slope_buffer, query_buffer, stage, step)
            score = warpgroup_mma_wait(2, deps=[score])
            weight, slope = weigh(
                score, factors, code, position // each, item, terms, tensors, limits,
                POWER, FOLDED, ROOMY,
            )  # fmt: skip
            # Loaded here: between the stores of dq it would wait for these, earlier it has no registers.
            delta = delta_of(delta_buffer, following)
            # A wait is a branch, across which the assembler does not move code: without one here the
            # weights would be computed after the products that they should overlap.
            mbarrier.wait(sum_out.index(step % PLACES), ((step // PLACES) & 1) ^ 1)
            value_sum = add_to_values(value_sum, weight, grad_buffer, following)
            # dq is stored while dk is still under way: its registers are the next product's.
            query_part = warpgroup_mma_wait(2, deps=[query_part])
            store_part(query_part, sum_buffer.index(step % PLACES))
            key_sum, value_sum = warpgroup_mma_wait(1, deps=[key_part, value_sum])
            mbarrier.arrive(rows_out.index(stage), count=1)
            stage = following
            step += 1

        bracket = bracket_of(delta, value_buffer, grad_buffer, stage, step)
        if PLACES == 1:
            fence_async_shared()
            mbarrier.arrive(sum_in.index(0), count=1, pred=each * group > 1)
        bracket, value_sum = warpgroup_mma_wait(0, deps=[bracket, value_sum])
        bracket_sum = store_slope(
            bracket, slope, bracket_sum, code, slope_buffer, step, item, tensors, limits,
            SINGLE, BIASED,
        )  # fmt: skip
        last_step = step
        if PLACES == 2:
            mbarrier.arrive(sum_in.index((last_step - 1) & 1), count=1, pred=each * group > 1)
        step += 1
        query_part = part_of_queries(turned, slope_buffer, key_buffer, last_step)
        key_part = add_to_keys(key_sum, slope_buffer, query_buffer, stage, last_step)
        staging = value_buffer.index(0)
        if key_factors is not None:
            value_sum = (
                value_sum * gl.convert_layout(factors, gl.SliceLayout(1, VALUE_SUM))[:, None]
            )
        is_first = row == key_row
        if key_turns is None:
            at = [batch, key_row % key_heads, tile * _KEYS, 0]
            staging.reshape([_KEYS, VALUE_SIZE]).store(value_sum.to(gl.bfloat16))
            fence_async_shared()
            store_tile(grad_value_tiles, at, staging)
        else:
            low, high = sides(value_sum)
            at = [key_row, tile * _KEYS, 0]
            at_high = [key_row, tile * _KEYS, VALUE_SIZE // 2]
            staging = as_floats(staging, _KEYS, VALUE_SIZE // 2, grad_value_tiles.layout)
            staging.reshape([_KEYS, VALUE_SIZE // 2]).store(low)
            fence_async_shared()
            arrived = arrivals(key_turns + key_row * tiles + tile)
            while arrived < row // (rows // share):
                arrived = arrivals(key_turns + key_row * tiles + tile)
            hand_over(grad_value_tiles, at, staging, is_first)
        own_sum = last_step % PLACES
        mbarrier.wait(sum_out.index(own_sum), ((last_step // PLACES) & 1) ^ 1)
        query_part, key_total = warpgroup_mma_wait(0, deps=[query_part, key_part])
        mbarrier.arrive(rows_out.index(stage), count=1)
        store_part(query_part, sum_buffer.index(own_sum))
        if BIASED:
            # Σ P·bracket: of the squares, Σ s·dS, what k_j·dk_j is; the rest is a constant a key.
            own_keys = key_buffer.index(0).reshape([_KEYS, SIZE]).load(SUM).to(gl.float32)
            squares = gl.convert_layout(gl.sum(own_keys * key_total, 1), KEY)
            if not FOLDED and gain is None:
                squares = squares * scale
            rest = gl.convert_layout(gl.sum(bracket_sum, 1), KEY) * inverse
            if key_factors is not None:
                rest = rest * factors
            key = tile * _KEYS + gl.arange(0, _KEYS, KEY)
            place_of_key = row.to(gl.int64) * num_keys + key
            gl.store(grad_key_bias + place_of_key, squares + rest, mask=key < num_keys)
        mbarrier.arrive(keys_out, count=1)
        if key_turns is None:
            tma.store_wait(0)
            staging = key_staging.index(0)
            staging.reshape([_KEYS, SIZE]).store((key_total * final).to(gl.bfloat16))
            fence_async_shared()
            mbarrier.arrive(sum_in.index(own_sum), count=1)
            store_tile(grad_key_tiles, at, staging)
        else:
            other = slope_buffer
            if SIZE == QUERIES:
                other = slope_buffer.index(0)
            other = as_floats(other, _KEYS, SIZE // 2, grad_key_tiles.layout)
            other.reshape([_KEYS, VALUE_SIZE // 2]).store(high)
            fence_async_shared()
            mbarrier.arrive(sum_in.index(own_sum), count=1)
            hand_over(grad_value_tiles, at_high, other, is_first)
            low, high = sides(key_total * final)
            tma.store_wait(1)
            staging.reshape([_KEYS, SIZE // 2]).store(low)
            fence_async_shared()
            hand_over(grad_key_tiles, at, staging, is_first)
            tma.store_wait(1)
            other.reshape([_KEYS, SIZE // 2]).store(high)
            fence_async_shared()
            hand_over(grad_key_tiles, at_high, other, is_first)
        tma.store_wait(0)
        mbarrier.arrive(values_out, count=1)
        turn += 1
        index = next_item(index_buffer, index_in, index_out, turn, 8)
    if key_turns is not None:
        complete()
        mbarrier.arrive(keys_added, count=1, pred=turn > 0)


@gluon.jit(
    do_not_specialize=[
        "tiles", "rows", "band", "tail", "sweep", "key_heads", "share", "group", "patterns",
        "query_tiles_count", "offset", "left", "right", "num_keys",
    ]
)  # fmt: skip
def backward_kernel(
    query_tiles, key_tiles, value_tiles, grad_tiles, delta_tiles, sum_tiles,
    grad_key_tiles, grad_value_tiles,
    spans, table, counter, turns, key_turns,
    gain, key_factors, grad_key_bias, starts, ends, keys, keys_batch, scale, inverse, final,
    tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count,
    offset, left, right, num_keys,
    STAGES: gl.constexpr, POWER: gl.constexpr, FOLDED: gl.constexpr, SINGLE: gl.constexpr,
    ROOMY: gl.constexpr,
):  # fmt: skip
    QUERIES: gl.constexpr = query_tiles.block_shape[2]
    SIZE: gl.constexpr = query_tiles.block_shape[3]
    VALUE_SIZE: gl.constexpr = value_tiles.block_shape[3]
    # Places for dq.
    PLACES: gl.constexpr = 2 if ROOMY else 1
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    query_buffer = gl.allocate_shared_memory(
        gl.bfloat16, [STAGES, 1, 1, QUERIES, SIZE], query_tiles.layout
    )
    grad_buffer = gl.allocate_shared_memory(
        gl.bfloat16, [STAGES, 1, 1, QUERIES, VALUE_SIZE], grad_tiles.layout
    )
    key_buffer = gl.allocate_shared_memory(gl.bfloat16, [1, 1, 1, _KEYS, SIZE], key_tiles.layout)
    value_buffer = gl.allocate_shared_memory(
        gl.bfloat16, [1, 1, 1, _KEYS, VALUE_SIZE], value_tiles.layout
    )
    # dv and then dk leave through the place of the values; that of the keys is free for others.
    key_staging = value_buffer
    if SIZE != VALUE_SIZE:
        key_staging = gl.allocate_shared_memory(
            gl.bfloat16, [1, 1, 1, _KEYS, SIZE], grad_key_tiles.layout
        )
    slope_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, _KEYS, QUERIES], SQUARE)
    sum_buffer = gl.allocate_shared_memory(gl.float32, [PLACES, 1, SIZE, 64], sum_tiles.layout)
    delta_buffer = gl.allocate_shared_memory(gl.float32, [STAGES, 1, QUERIES], delta_tiles.layout)
    index_buffer = gl.allocate_shared_memory(gl.int32, [2, 1], PLAIN)
    code_buffer = gl.allocate_shared_memory(gl.int32, [STAGES, 1], PLAIN)
    keys_in = gl.allocate_shared_memory(gl.int64, [1], BAR)
    keys_out = gl.allocate_shared_memory(gl.int64, [1], BAR)
    values_in = gl.allocate_shared_memory(gl.int64, [1], BAR)
    values_out = gl.allocate_shared_memory(gl.int64, [1], BAR)
    sum_in = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    sum_out = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    keys_added = gl.allocate_shared_memory(gl.int64, [1], BAR)
    rows_in = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    rows_out = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    index_in = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    index_out = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    mbarrier.init(keys_in, count=1)
    mbarrier.init(keys_out, count=1)
    mbarrier.init(values_in, count=1)
    mbarrier.init(values_out, count=1)
    for i in gl.static_range(PLACES):
        mbarrier.init(sum_in.index(i), count=1)
        mbarrier.init(sum_out.index(i), count=1)
    mbarrier.init(keys_added, count=1)
    for i in gl.static_range(STAGES):
        # One arrival for the copies, one for the code.
        mbarrier.init(rows_in.index(i), count=2)
        mbarrier.init(rows_out.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(index_in.index(i), count=1)
        mbarrier.init(index_out.index(i), count=2)
    fence_async_shared()
    descriptors = (query_tiles, key_tiles, value_tiles, grad_tiles, delta_tiles)
    buffers = (
        query_buffer, key_buffer, value_buffer, grad_buffer, delta_buffer, index_buffer,
        code_buffer, slope_buffer, sum_buffer, key_staging,
    )  # fmt: skip
    barriers = (
        keys_in, keys_out, values_in, values_out, rows_in, rows_out,
        sum_in, sum_out, keys_added, index_in, index_out,
    )  # fmt: skip
    shape = (tiles, rows, band, tail, sweep, key_heads, share, group, patterns, query_tiles_count)
    terms = (scale, inverse, final)
    tensors = (gain, starts, ends, keys, keys_batch)
    limits = (offset, left, right, num_keys)
    out_tiles = (grad_key_tiles, grad_value_tiles)
    key_terms = (key_factors, grad_key_bias)
    gl.warp_specialize(
        [
            (consumer, (out_tiles, key_turns, key_terms, buffers, barriers, spans, terms, tensors,
                        limits, shape, STAGES, POWER, FOLDED, SINGLE, ROOMY)),
            (producer, (descriptors, buffers, barriers, spans, table, counter, shape, limits,
                        STAGES)),
            (writer, (sum_tiles, key_turns, buffers, barriers, spans, table, turns, shape, limits,
                      QUERIES)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip
