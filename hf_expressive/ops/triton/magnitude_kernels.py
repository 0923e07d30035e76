"""The kernels of `magnitude`: see there for the formula and letters.

With a = max |x_d|, t_d = |x_d| / a and S = Σ t_d^p, no power of x over- or underflows:

    ‖x‖_p² = a² S^(2/p)
    d‖x‖_p²/dx_d = 2 a S^(2/p − 1) t_d^(p − 1) sign x_d
    d‖x‖_p²/dp = ‖x‖_p² (2/p) (Σ t_d^p ln t_d / S − ln S / p)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features_kernels import SPAN, is_current, load_rows
from .host import launch
from .launch import ceil_div, power_of_two
from .tiles import row_place

_ELEMENTS = 4096  # of x a program
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scaled_rows(
    x,
    exponents,
    p,
    heads,
    positions,
    x_batch,
    x_head,
    x_position,
    x_size,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Positions, whether they exist, x, a, log₂ t (−150 where t is 0), t^p (0 there), and p."""
    flat_head = tl.program_id(0)
    head = flat_head % heads
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < positions
    place = row_place(flat_head // heads, head, position, x_batch, x_head, x_position)
    rows = load_rows(x, place, x_size, inside, DIM, BLOCK_D).to(tl.float32)
    exponent = p
    if exponents is not None:
        exponent = tl.load(exponents + head)
    size = tl.abs(rows)
    largest = tl.max(size, 1)
    # The inverse of a smaller one would overflow; its square is 0 anyway.
    largest = tl.where(largest < 1e-37, 1.0, largest)
    ratio = size * (1.0 / largest)[:, None]
    # t may be 0 though x is not; 2^-150 is below every float32.
    logarithm = tl.where(ratio == 0.0, -150.0, tl.log2(tl.where(ratio == 0.0, 1.0, ratio)))
    power = tl.where(ratio == 0.0, 0.0, tl.exp2(exponent * logarithm))
    return position, inside, rows, largest, logarithm, power, exponent


@triton.jit
def forward_kernel(
    x,
    exponents,
    out,
    stale,
    p,
    factor,
    heads,
    positions,
    rows,
    x_batch,
    x_head,
    x_position,
    x_size,
    SPAN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """m into a tensor with `rows` positions a head, all of them or those in `stale` spans."""
    flat_head = tl.program_id(0)
    if stale is not None:  # noqa: SIM102 - decided at compile time
        if is_current(stale, flat_head, tl.program_id(1) * BLOCK_N, rows, SPAN):
            return
    position, inside, _, largest, _, power, exponent = scaled_rows(
        x, exponents, p, heads, positions, x_batch, x_head, x_position, x_size,
        DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total = tl.sum(power, 1)
    zero = total == 0.0
    root = tl.exp2(tl.log2(tl.where(zero, 1.0, total)) * (2.0 / exponent))
    result = tl.where(zero, 0.0, root * largest * largest * factor)
    tl.store(out + flat_head.to(tl.int64) * rows + position, result, mask=inside)


@triton.jit
def backward_kernel(
    grad,
    x,
    exponents,
    grad_x,
    parts,
    p,
    factor,
    heads,
    positions,
    grad_batch,
    grad_head,
    grad_position,
    x_batch,
    x_head,
    x_position,
    x_size,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx and, with exponents, what the rows of a program add to dp: parts (B · K, programs)."""
    position, inside, rows, largest, logarithm, power, exponent = scaled_rows(
        x, exponents, p, heads, positions, x_batch, x_head, x_position, x_size,
        DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    flat_head = tl.program_id(0)
    row = flat_head.to(tl.int64) * positions + position
    place = row_place(
        flat_head // heads, flat_head % heads, position, grad_batch, grad_head, grad_position
    )
    outer = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * factor
    total = tl.sum(power, 1)
    total = tl.where(total == 0.0, 1.0, total)
    turns = tl.log2(total)
    slope = tl.exp2(turns * (2.0 / exponent - 1.0)) * largest * outer
    direction = tl.where(rows > 0.0, 2.0, tl.where(rows < 0.0, -2.0, 0.0))
    gradient = direction * tl.exp2((exponent - 1.0) * logarithm) * slope[:, None]
    size = tl.arange(0, BLOCK_D)
    tl.store(
        grad_x + row[:, None] * DIM + size[None, :],
        gradient.to(grad_x.dtype.element_ty),
        mask=inside[:, None] & (size < DIM)[None, :],
    )
    if exponents is not None:
        spread = tl.sum(power * logarithm, 1) / total - turns / exponent
        root = tl.exp2(turns * (2.0 / exponent)) * largest * largest
        change = outer * root * spread * (2.0 / exponent * _LN_2)
        # A row of zeros has the norm 0 whatever p is.
        change = tl.where(tl.sum(power, 1) == 0.0, 0.0, change)
        part = flat_head * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts + part, tl.sum(change, 0))


def _options(x: Tensor) -> dict[str, Any]:
    block = power_of_two(x.shape[3])
    return {"DIM": x.shape[3], "BLOCK_N": min(SPAN, _ELEMENTS // block), "BLOCK_D": block}


def forward(
    x: Tensor,
    exponents: Tensor | None,
    p: float,
    factor: float,
    out: Tensor | None = None,
    stale: Tensor | None = None,
) -> Tensor:
    """m(x), (B, K, N), float32; exponents: (K,), float32, or `None`: p.

    With `out`, contiguous, (B, K, N or more): there, and only where `stale` says, (B · K, spans).
    """
    batch, heads, positions, _ = x.shape
    options = _options(x)
    if out is None:
        out = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    launch(
        forward_kernel,
        (batch * heads, ceil_div(positions, options["BLOCK_N"])),
        x,
        None if exponents is None else exponents.contiguous(),
        out,
        stale,
        p,
        factor,
        heads,
        positions,
        out.shape[2],
        *x.stride(),
        SPAN=SPAN,
        **options,
    )
    return out


def backward(
    grad: Tensor, x: Tensor, exponents: Tensor | None, p: float, factor: float
) -> tuple[Tensor, Tensor]:
    """dx, contiguous, in the dtype of `x`, and dp, (K,), float32, empty without exponents."""
    batch, heads, positions, _ = x.shape
    options = _options(x)
    programs = ceil_div(positions, options["BLOCK_N"])
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = None
    if exponents is not None:
        parts = torch.empty((batch, heads, programs), dtype=torch.float32, device=x.device)
    launch(
        backward_kernel,
        (batch * heads, programs),
        grad,
        x,
        None if exponents is None else exponents.contiguous(),
        grad_x,
        parts,
        p,
        factor,
        heads,
        positions,
        *grad.stride(),
        *x.stride(),
        **options,
    )
    return grad_x, grad.new_empty(0).float() if parts is None else parts.sum(dim=(0, 2))
