"""The kernels of `features`: see there for formulas and letters."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import launch
from .launch import COMPILED, ceil_div, power_of_two
from .tiles import row_place

# Positions and frequencies of a tile; exact products of float32 and wide heads fill registers.
_TILE, _SMALL_TILE = (64, 64), (32, 16)
#: Positions that are made again together; tiles divide it.
SPAN = 64
_RUN = 16  # tiles of positions whose contributions to dW one program adds


@triton.jit
def product(a, b, PRECISE: tl.constexpr):
    """a @ b in float32 arithmetic, b in float32.

    Half-precision operands meet the two leading parts of b, which hold at least 16 of its bits, on the
    matrix units: an angle of ten turns keeps an error far below the rounding of the result.
    """
    if PRECISE:
        return tl.dot(a.to(tl.float32), b, input_precision="ieee")
    else:
        high = b.to(a.dtype)
        low = (b - high.to(tl.float32)).to(a.dtype)
        return tl.dot(a, high, tl.dot(a, low))


@triton.jit
def circle(cycles, FAST: tl.constexpr):
    """(cos 2πt, sin 2πt). Whole turns are taken off first: |error| < 2⁻²⁰ whatever the angle."""
    angle = (cycles - tl.floor(cycles + 0.5)) * 6.283185307179586
    if FAST:
        cosine = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        sine = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        return cosine, sine
    else:
        return tl.cos(angle), tl.sin(angle)


@triton.jit
def load_rows(pointer, place, size_stride, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a (B, H, N, SIZE) tensor, zero where not `inside`; place: their offsets."""
    size = tl.arange(0, BLOCK)
    places = place[:, None] + (size * size_stride)[None, :]
    return tl.load(pointer + places, mask=inside[:, None] & (size < SIZE)[None, :], other=0.0)


@triton.jit
def load_samples(frequencies, sample_row, column, DIM: tl.constexpr, COUNT: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """Columns of one density's W, (BLOCK_D, columns), zero outside."""
    size = tl.arange(0, BLOCK_D)
    place = (sample_row.to(tl.int64) * DIM + size)[:, None] * COUNT + column[None, :]
    inside = (size < DIM)[:, None] & (column < COUNT)[None, :]
    return tl.load(frequencies + place, mask=inside, other=0.0)


@triton.jit
def angle_gradient(
    grad, grad_place, grad_size, inside, cycles, column, COUNT: tl.constexpr, FAST: tl.constexpr
):
    """dL/d(2πt) · S√M of a tile: −sin 2πt · dcos + cos 2πt · dsin."""
    known = inside[:, None] & (column < COUNT)[None, :]
    places = grad_place[:, None] + (column * grad_size)[None, :]
    grad_cosine = tl.load(grad + places, mask=known, other=0.0).to(tl.float32)
    grad_sine = tl.load(grad + places + COUNT * grad_size, mask=known, other=0.0).to(tl.float32)
    cosine, sine = circle(cycles, FAST)
    return cosine * grad_sine - sine * grad_cosine


@triton.jit
def sample_head(flat_head, heads, group, BATCHED: tl.constexpr):
    """Row of the frequencies over (B or 1, K) that a flat head of x uses."""
    head = flat_head % heads // group
    if BATCHED:
        head += flat_head // heads * (heads // group)
    return head


@triton.jit
def is_current(stale, flat_head, first, rows, SPAN: tl.constexpr):
    """Whether positions from `first` on have what was computed of them; see `cached_features`."""
    return tl.load(stale + flat_head * tl.cdiv(rows, SPAN) + first // SPAN) == 0


@triton.jit
def forward_kernel(
    x,
    frequencies,
    out,
    stale,
    factor,
    normalise,
    heads,
    group,
    positions,
    rows,
    x_batch,
    x_head,
    x_position,
    x_size,
    DIM: tl.constexpr,
    DENSITIES: tl.constexpr,
    COUNT: tl.constexpr,
    BATCHED: tl.constexpr,
    PRECISE: tl.constexpr,
    FAST: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """φ into a tensor with `rows` positions a head, all of them or those in `stale` spans."""
    flat_head = tl.program_id(0)
    if stale is not None:  # noqa: SIM102 - decided at compile time
        if is_current(stale, flat_head, tl.program_id(1) * BLOCK_N, rows, SPAN):
            return
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < positions
    place = row_place(flat_head // heads, flat_head % heads, position, x_batch, x_head, x_position)
    x_tile = load_rows(x, place, x_size, inside, DIM, BLOCK_D)
    sample = sample_head(flat_head, heads, group, BATCHED)
    row = flat_head.to(tl.int64) * rows + position
    for start in range(0, COUNT, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        cosines = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        sines = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for density in tl.static_range(DENSITIES):
            samples = load_samples(
                frequencies, sample * DENSITIES + density, column, DIM, COUNT, BLOCK_D
            )
            cosine, sine = circle(product(x_tile, samples, PRECISE) * factor, FAST)
            cosines += cosine
            sines += sine
        places = row[:, None] * (2 * COUNT) + column[None, :]
        known = inside[:, None] & (column < COUNT)[None, :]
        tl.store(out + places, (cosines * normalise).to(out.dtype.element_ty), mask=known)
        tl.store(out + places + COUNT, (sines * normalise).to(out.dtype.element_ty), mask=known)


@triton.jit
def input_kernel(
    grad,
    x,
    frequencies,
    grad_x,
    factor,
    outer,
    heads,
    group,
    positions,
    grad_batch,
    grad_head,
    grad_position,
    grad_size,
    x_batch,
    x_head,
    x_position,
    x_size,
    DIM: tl.constexpr,
    DENSITIES: tl.constexpr,
    COUNT: tl.constexpr,
    BATCHED: tl.constexpr,
    PRECISE: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx; outer = 2π · factor / (S √M)."""
    flat_head = tl.program_id(0)
    batch = flat_head // heads
    head = flat_head % heads
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < positions
    place = row_place(batch, head, position, x_batch, x_head, x_position)
    grad_place = row_place(batch, head, position, grad_batch, grad_head, grad_position)
    rows = load_rows(x, place, x_size, inside, DIM, BLOCK_D)
    sample = sample_head(flat_head, heads, group, BATCHED)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, COUNT, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        for density in tl.static_range(DENSITIES):
            samples = load_samples(
                frequencies, sample * DENSITIES + density, column, DIM, COUNT, BLOCK_D
            )
            cycles = product(rows, samples, PRECISE) * factor
            slope = angle_gradient(grad, grad_place, grad_size, inside, cycles, column, COUNT, FAST)
            total += product(slope.to(rows.dtype), tl.trans(samples), PRECISE)
    size = tl.arange(0, BLOCK_D)
    row = flat_head.to(tl.int64) * positions + position
    tl.store(
        grad_x + row[:, None] * DIM + size[None, :],
        (total * outer).to(grad_x.dtype.element_ty),
        mask=inside[:, None] & (size < DIM)[None, :],
    )


@triton.jit
def samples_kernel(
    grad,
    x,
    frequencies,
    parts,
    factor,
    outer,
    heads,
    group,
    positions,
    grad_batch,
    grad_head,
    grad_position,
    grad_size,
    x_batch,
    x_head,
    x_position,
    x_size,
    DIM: tl.constexpr,
    DENSITIES: tl.constexpr,
    COUNT: tl.constexpr,
    BATCHED: tl.constexpr,
    PRECISE: tl.constexpr,
    FAST: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What a run of positions of one head adds to a few columns of dW, (B · H, runs, S, D, M)."""
    flat_head = tl.program_id(0)
    batch = flat_head // heads
    head = flat_head % heads
    density = tl.program_id(2) % DENSITIES
    column = tl.program_id(2) // DENSITIES * BLOCK_M + tl.arange(0, BLOCK_M)
    sample = sample_head(flat_head, heads, group, BATCHED) * DENSITIES + density
    samples = load_samples(frequencies, sample, column, DIM, COUNT, BLOCK_D)
    total = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for step in range(RUN):
        position = (tl.program_id(1) * RUN + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = position < positions
        place = row_place(batch, head, position, x_batch, x_head, x_position)
        grad_place = row_place(batch, head, position, grad_batch, grad_head, grad_position)
        rows = load_rows(x, place, x_size, inside, DIM, BLOCK_D)
        cycles = product(rows, samples, PRECISE) * factor
        slope = angle_gradient(grad, grad_place, grad_size, inside, cycles, column, COUNT, FAST)
        total += product(tl.trans(rows), slope, PRECISE)
    part = (flat_head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * DENSITIES + density
    size = tl.arange(0, BLOCK_D)
    places = (part * DIM + size)[:, None] * COUNT + column[None, :]
    inside = (size < DIM)[:, None] & (column < COUNT)[None, :]
    tl.store(parts + places, total * outer, mask=inside)


def _options(x: Tensor, frequencies: Tensor) -> dict[str, Any]:
    """Compile-time choices of all three kernels."""
    small = COMPILED and (x.dtype == torch.float32 or x.shape[3] > 128)
    positions, columns = _SMALL_TILE if small else _TILE
    return {
        "DIM": x.shape[3],
        "DENSITIES": frequencies.shape[2],
        "COUNT": frequencies.shape[4],
        "BATCHED": frequencies.shape[0] > 1,
        # The interpreter's products of half precision are wrong.
        "PRECISE": x.dtype == torch.float32 or not COMPILED,
        "FAST": COMPILED and torch.version.hip is None,
        "BLOCK_N": positions,
        "BLOCK_M": min(columns, power_of_two(frequencies.shape[4])),
        "BLOCK_D": power_of_two(x.shape[3]),
        "num_warps": 4,
        "num_stages": 1,
    }


def _normalise(frequencies: Tensor) -> float:
    """1 / (S √M)."""
    return 1.0 / (frequencies.shape[2] * math.sqrt(frequencies.shape[4]))


def forward(
    x: Tensor,
    frequencies: Tensor,
    factor: float,
    out: Tensor | None = None,
    stale: Tensor | None = None,
) -> Tensor:
    """φ, (B, H, N, 2M) in the dtype of `x`; frequencies: (B or 1, K, S, D, M), float32.

    With `out`, contiguous, (B, H, N or more, 2M): there, and only where `stale` says, (B · H, spans).
    """
    batch, heads, positions, _ = x.shape
    options = _options(x, frequencies)
    if out is None:
        out = x.new_empty((batch, heads, positions, 2 * frequencies.shape[4]))
    launch(
        forward_kernel,
        (batch * heads, ceil_div(positions, options["BLOCK_N"])),
        x,
        frequencies.contiguous(),
        out,
        stale,
        factor,
        _normalise(frequencies),
        heads,
        heads // frequencies.shape[1],
        positions,
        out.shape[2],
        *x.stride(),
        **options,
        SPAN=SPAN,
    )
    return out


def backward_input(grad: Tensor, x: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """dx, contiguous, in the dtype of `x`; grad: dφ, any strides."""
    batch, heads, positions, _ = x.shape
    options = _options(x, frequencies)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(
        input_kernel,
        (batch * heads, ceil_div(positions, options["BLOCK_N"])),
        grad,
        x,
        frequencies.contiguous(),
        grad_x,
        factor,
        2.0 * math.pi * factor * _normalise(frequencies),
        heads,
        heads // frequencies.shape[1],
        positions,
        *grad.stride(),
        *x.stride(),
        **options,
    )
    return grad_x


def backward_samples(grad: Tensor, x: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """dW in the shape of `frequencies`, float32; grad: dφ, any strides."""
    batch, heads, positions, _ = x.shape
    samples_batch, kv_heads, *sizes = frequencies.shape
    options = _options(x, frequencies)
    runs = ceil_div(positions, _RUN * options["BLOCK_N"])
    parts = frequencies.new_empty((batch, kv_heads, heads // kv_heads, runs, *sizes))
    columns = ceil_div(frequencies.shape[4], options["BLOCK_M"])
    launch(
        samples_kernel,
        (batch * heads, runs, columns * frequencies.shape[2]),
        grad,
        x,
        frequencies.contiguous(),
        parts,
        factor,
        2.0 * math.pi * factor * _normalise(frequencies),
        heads,
        heads // kv_heads,
        positions,
        *grad.stride(),
        *x.stride(),
        **options,
        RUN=_RUN,
    )
    total = parts.sum(dim=(2, 3))
    return total if samples_batch > 1 else total.sum(dim=0, keepdim=True)
