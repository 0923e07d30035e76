"""Operations that Gluon lacks: bulk additions, counters between programs, pairs in registers.

Most are a line of assembly. The tests, which run the kernels on the CPU, have another form of each.
"""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.7 or so renamed the two bulk copies.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def add_tile(tensor_desc, coord, src, _semantic=None):
    """Asynchronous addition of a tile in shared memory to one in global memory."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle
    )


@builtin
def as_floats(buffer, rows, columns, layout, _semantic=None):
    """A buffer in shared memory as one of (1, rows, columns) float32.

    Its own method has another name in other versions of Triton.
    """
    shape = [1, _unwrap_if_constexpr(rows), _unwrap_if_constexpr(columns)]
    layout = _unwrap_if_constexpr(layout)
    return _semantic.memdesc_reinterpret(buffer, gl.float32, shape, layout)


@gluon.jit
def number(buffer, place, WARPS: gl.constexpr):
    """The number at a place of a buffer, for a partition of so many warps."""
    return gl.max(buffer.index(place).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def unsigned(x):
    """A 32-bit integer read as an unsigned one."""
    return x.to(gl.uint32)


@gluon.jit
def nothing(step):
    """0, which the compiler does not know: it would otherwise keep the operands' descriptors, dozens of
    registers, from before the loop."""
    return step >> 30


@gluon.jit
def arrivals(pointer):
    """The counter at `pointer`.

    Relaxed: the additions that it orders take place in the L2 cache; an acquiring load would empty the
    L1 cache of the whole multiprocessor.
    """
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.u32 $0, [$1];", "=r,l", [pointer],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def publish(pointer, PENDING: gl.constexpr):
    """Waits until all but the last `PENDING` bulk copies are in global memory, raises the counter.

    Relaxed as well: what is complete is in the L2 cache, where the counter is raised; a release would
    take the writer a fifth of a step.
    """
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
        @p red.relaxed.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def complete():
    """Waits until all bulk copies of a thread are in global memory."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r,r", [0],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def reciprocal(x):
    """1 / x, relative error below 2⁻²³."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def lane_sums(weight, HALF: gl.constexpr, KEYS: gl.constexpr):
    """Row sums of a tile within each thread: (HALF, 4), without any exchange between threads."""
    return gl.sum(gl.sum(weight.reshape([HALF, KEYS // 8, 4, 2]), 3), 1)


@gluon.jit
def as_multiplied(weight, DTYPE: gl.constexpr, LIFT: gl.constexpr):
    """The weight as the product with the values will see it, rounded to their dtype.

    In assembler: the compiler would otherwise share this conversion with the one of the product, at the
    cost of registers that it does not have.
    """
    FLOAT16: gl.constexpr = "{.reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.f32.f16 $0, h;}"
    BFLOAT16: gl.constexpr = "{.reg .b16 h; cvt.rn.bf16.f32 h, $1; mov.b32 $0, {0, h};}"
    rounded = gl.inline_asm_elementwise(
        FLOAT16 if gl.float16 == DTYPE else BFLOAT16,
        "=f,f", [weight * LIFT], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return rounded * (1.0 / LIFT)


@gluon.jit
def settled(x):
    """x, computed here and now: the compiler would put it off until it is needed."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def packed(x):
    """Pairs of neighbours of x (M, N) as bfloat16 in the two halves of int32 (M, N/2), here and now.

    Until they are needed slopes do not fit into the registers as float32; and the compiler would put
    off the conversion, or the whole computation, until then.
    """
    low, high = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;",
        "=r,f,f",
        [low, high],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def products(one, other):
    """Products of `packed` pairs, rounded."""
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [one, other], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def halves(pairs, LAYOUT: gl.constexpr):
    """The bfloat16 (M, N) of `packed` pairs."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True, pack=1,
    )  # fmt: skip
    whole = gl.join(low, high).reshape([pairs.shape[0], pairs.shape[1] * 2])
    return gl.convert_layout(whole, LAYOUT, assert_trivial=True)
