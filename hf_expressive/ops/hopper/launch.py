"""From an `AttentionProblem` to a launch of the forward kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..layout import empty_rows
from ..problem import AttentionProblem
from ..triton import tiled_forward as portable
from ..triton.host import describe, launch
from ..triton.launch import (
    Call,
    ceil_div,
    contiguous_float,
    element_strides,
    is_foldable,
    num_processors,
    shown_keys,
)
from .plan import KEYS, ROWS, fill_empty, is_arithmetic, plan, reach
from .tiled_forward import forward_kernel

# A half of the queries: what one matrix instruction spans.
HALF = ROWS // 2
# Keys and values of the heads that programs work on at a time; they should stay in the L2 cache, of
# which an H200 has 50 MiB. With all heads at once it thrashes (hit rate 42 % instead of 84 %).
_BAND_BYTES = 16 * 2**20
#: Blocks of keys and values in flight, at most as many as fit 227 KiB. Key: sizes of keys and values.
STAGES = {(64, 64): 4, (64, 128): 3, (128, 64): 3, (128, 128): 2}
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """`ops.hopper.forward`.

    A square response may come with a key bias c: its weights are multiplied by exp(c_j − max c), one
    maximum a key/value head. Heads whose c spread too far for that are computed again by the portable
    kernel, which leaves the others alone; which they are, is known on the device only.

    Returns:
        out: (B, H, Q, E), dtype and order in memory those of the query.
        log_normalizer: (B, H, Q), float32, −inf for a row that sees nothing.
    """
    batch, heads, num_queries, size = problem.query.shape
    num_keys, value_size = problem.value.shape[2:]
    out = empty_rows(problem.query, value_size)
    log_normalizer = out.new_empty(batch, heads, num_queries, dtype=torch.float32)
    tables = None if is_arithmetic(problem) else plan(problem)
    count = ceil_div(num_queries, ROWS)
    keys = shown_keys(problem)
    gain, sinks, response = problem.gain, problem.sinks, problem.response
    foldable = is_foldable(problem)
    factors = levels = None
    epsilon, common_level = square_terms(problem)
    call = None if problem.key_bias is None else Call(problem)
    if call is not None:
        assert call.key_factor is not None
        factors, levels = pieces(call.key_factor.flatten(0, 1), 1, KEYS), call.level
    half_precision = problem.query.dtype == torch.float16
    pair_bytes = num_keys * (size + value_size) * problem.key.element_size()
    band = min(max(1, _BAND_BYTES // pair_bytes) * problem.group, batch * heads)
    # Masks shorten rows, and a band has less work: two of them end it without waits for a long row.
    tail = min(band if problem.ranges is None else 2 * band, batch * heads)
    if tables is not None:
        fill_empty(tables, out, log_normalizer)
    programs = min(num_processors(problem), count * batch * heads)
    launch(
        forward_kernel,
        (programs,),
        tiles(problem.query, HALF),
        tiles(problem.key, KEYS),
        tiles(problem.value, KEYS),
        factors,
        tiles(out, HALF),
        log_normalizer,
        None if tables is None else tables.tiles,
        None if tables is None else tables.rows,
        out.new_zeros(1, dtype=torch.int32),
        contiguous_float(gain),
        sinks,
        keys,
        levels,
        float(problem.scale),
        common_level,
        epsilon,
        *element_strides(sinks, 3),
        *element_strides(keys, 1),
        count,
        batch * heads,
        band,
        tail,
        heads,
        problem.group,
        1 if tables is None else tables.patterns,
        num_queries,
        num_keys - num_queries,
        *reach(problem),
        num_keys,
        HALF=HALF,
        KEYS=KEYS,
        STAGES=STAGES[size, value_size],
        POWER=0 if response.kind == "square" else int(response.power),
        FOLDED=foldable,
        # Keeps small weights out of the subnormal range of float16.
        LIFT=2.0**14 if half_precision else 1.0,
        num_warps=4,
    )
    if call is not None:
        _, for_wide_spreads = call.rules()
        portable.compute(call, for_wide_spreads, out, log_normalizer)
    return out, log_normalizer


def square_terms(problem: AttentionProblem) -> tuple[float, float]:
    """(ε, logarithm of what all weights lack) of a square response, else (0, 0)."""
    if problem.response.kind != "square":
        return 0.0, 0.0
    epsilon = problem.response.epsilon
    if not is_foldable(problem):
        return epsilon, 0.0
    return epsilon / problem.scale**2, 2.0 * math.log(abs(problem.scale))


def pieces(tensor: Tensor, *block: int) -> TensorDescriptor:
    """Descriptor of blocks of a float32 tensor."""
    return describe(TensorDescriptor, tensor, block, _pieces_layout)


def tiles(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of tiles of a (B, heads, length, size) tensor, `rows` by the whole size."""
    return describe(TensorDescriptor, tensor, (1, 1, rows, tensor.shape[-1]), _tiles_layout)


def _pieces_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128 if len(block) > 2 else 0, 32, len(block))


def _tiles_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
