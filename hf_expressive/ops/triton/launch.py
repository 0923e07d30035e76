"""From an `AttentionProblem` to kernel arguments: tile descriptors, terms, compile-time choices.

All of it runs before every launch, so what depends on sizes and options alone is remembered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dropout import threshold
from ..problem import AttentionProblem
from ..response import Response
from .host import describe, launch
from .tiles import EXP, HILL, SQUARE, Rule, Sizes, Terms, mix

#: Whether kernels are compiled (and may hold inline assembly), not interpreted.
COMPILED = isinstance(mix, JITFunction)

_KINDS = {"hill": HILL.value, "square": SQUARE.value, "exp": EXP.value}


@dataclass(frozen=True, slots=True)
class TileShape:
    """Rows and keys of a tile, warps of a program, loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Chosen by measurement on one H200 (bf16, causal, 4096 queries), which lends a program 227 KiB of
# shared memory. Key: kernel and the larger head size rounded up to a power of two.
_PLAIN = {
    ("forward", 64): TileShape(128, 64, 8, 3),
    ("forward", 128): TileShape(128, 64, 4, 2),
    ("forward", 256): TileShape(128, 64, 8, 2),
    ("backward_key", 64): TileShape(64, 64, 4, 3),
    ("backward_key", 128): TileShape(64, 64, 4, 2),
    ("backward_key", 256): TileShape(64, 64, 8, 2),
    ("backward_query", 64): TileShape(128, 64, 8, 3),
    ("backward_query", 128): TileShape(128, 64, 8, 3),
    ("backward_query", 256): TileShape(128, 32, 8, 2),
    ("backward_bias", 64): TileShape(64, 64, 4, 2),
    ("backward_bias", 128): TileShape(64, 64, 4, 2),
    ("backward_bias", 256): TileShape(64, 32, 4, 1),
    ("decode", 64): TileShape(16, 128, 4, 3),
    ("decode", 128): TileShape(16, 128, 4, 3),
    ("decode", 256): TileShape(16, 32, 4, 3),
}
# What beats them where rows carry a running maximum of an additive log-weight.
_SHIFTED = _PLAIN | {("forward", 64): TileShape(128, 64, 4, 3)}
# Wherever there is less shared memory; and for float32, whose exact products fill registers (Triton
# 3.6 miscompiles tiles of 16 by 16 with 8 warps).
_SMALL = {64: TileShape(64, 32, 4, 2), 128: TileShape(32, 32, 4, 2), 256: TileShape(16, 32, 4, 1)}
_EXACT = {64: TileShape(32, 32, 8, 1), 128: TileShape(16, 32, 4, 1), 256: TileShape(16, 16, 4, 1)}
# The interpreter runs one program at a time: large tiles are fastest, these still make several of them.
_INTERPRETED = TileShape(32, 32, 4, 1)
_LARGE_SHARED_MEMORY = 220 * 1024  # bytes
# What the programs at work share should stay in the L2 cache: about a third of an H200's 50 MiB.
_BUNDLE_BYTES = 16 * 2**20
#: Natural logarithms over which a key bias may spread where one reference level serves a whole
#: key/value head: weights stay 26 decades above the smallest float32, their inverses below the largest.
STEADY = 60.0


@cache
def _tile_shape(
    kernel: str, size: int, rule: Rule, dtype: torch.dtype, device: torch.device
) -> TileShape:
    """The tile shape of a kernel for the larger head size, rounded up to a power of two."""
    size = max(64, size)
    if not COMPILED:
        return _INTERPRETED
    if dtype == torch.float32:
        return _EXACT[size]
    if rule.wide or _properties(device).shared_memory_per_block_optin < _LARGE_SHARED_MEMORY:
        return _SMALL[size]
    return (_SHIFTED if rule.shifted else _PLAIN)[kernel, size]


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def num_processors(problem: AttentionProblem) -> int:
    """Multiprocessors of the device of a problem; a few for the interpreter."""
    return _num_processors(problem.query.device)


@torch.compiler.assume_constant_result
def _num_processors(device: torch.device) -> int:
    return int(_properties(device).multi_processor_count) if COMPILED else 3


def ceil_div(number: int, unit: int) -> int:
    """⌈number / unit⌉ (Triton's own takes longer than a launch)."""
    return -(-number // unit)


def power_of_two(size: int, *, least: int = 16) -> int:
    """`size` rounded up to a power of two; 16 is the smallest side of a product."""
    return max(least, 1 << (size - 1).bit_length())


@cache
def _rule(
    response: Response,
    dtype: torch.dtype,
    dropout: float,
    *,
    foldable: bool,
    capped: bool,
    key_bias: bool,
    bias: bool,
    tf32: bool,
    steady: bool,
) -> Rule:
    """The compile-time choices; see `Rule`."""
    half = dtype == torch.float16
    kind = response.kind
    keyed = steady and (kind == "square" or key_bias) and kind != "exp" and not bias and not half
    shifted = not keyed and (kind != "hill" or key_bias or bias)
    plain = kind == "hill" and not (key_bias or bias) and response.power == 1.0 and not capped
    return Rule(
        kind=_KINDS[kind],
        power=float(response.power),
        epsilon=float(response.epsilon),
        limit=response.limit(torch.float32),
        threshold=threshold(dropout),
        plain=plain,
        # Gradients without the scale sink below the range of float16.
        folded=foldable and (plain or kind == "square") and not half and not capped,
        shifted=shifted,
        keyed=keyed,
        # The factors outgrow the range of float16.
        prescaled=(plain or keyed) and not half,
        lift=2.0**14 if half and kind == "hill" else 1.0,
        # z² is unbounded.
        wide=half and kind == "square",
        precision="tf32" if tf32 else "ieee",
        fast=COMPILED and torch.version.hip is None,
        interpreted=not COMPILED,
    )


def is_foldable(problem: AttentionProblem) -> bool:
    """Whether kernels may move the scale out of the scores.

    An extreme one would overflow its powers, and a learned one may become extreme.
    """
    return problem.gain is None and 1e-4 <= abs(problem.scale) <= 1e4


def shown_keys(problem: AttentionProblem) -> Tensor | None:
    """`KeyRanges.keys` as the kernels read them: uint8, contiguous, (B or 1, N)."""
    ranges = problem.ranges
    if ranges is None or ranges.keys is None:
        return None
    return ranges.keys.contiguous().view(torch.uint8)


def _rule_of(problem: AttentionProblem, *, steady: bool) -> Rule:
    return _rule(
        problem.response,
        problem.query.dtype,
        problem.dropout,
        foldable=is_foldable(problem),
        capped=problem.softcap is not None,
        key_bias=problem.key_bias is not None,
        bias=problem.bias is not None,
        # What `allow_tf32` sets, too; that raises an error once somebody has used this name.
        tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        steady=steady,
    )


def element_strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """The first strides in elements, 0 where the tensor broadcasts or is absent."""
    if tensor is None:
        return (0,) * dimensions
    sizes = tensor.shape[:dimensions]
    return tuple(
        0 if size == 1 else stride for size, stride in zip(sizes, tensor.stride(), strict=False)
    )


def contiguous_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


@triton.jit
def key_runs_kernel(keys, runs, num_keys, BLOCK: tl.constexpr):
    keys += tl.program_id(0).to(tl.int64) * num_keys
    first = num_keys
    last = 0
    for start in range(0, num_keys, BLOCK):
        key = start + tl.arange(0, BLOCK)
        seen = tl.load(keys + key, mask=key < num_keys, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(seen, key, num_keys), 0))
        last = tl.maximum(last, tl.max(tl.where(seen, key + 1, 0), 0))
    hole = last
    for start in range(0, num_keys, BLOCK):
        key = start + tl.arange(0, BLOCK)
        seen = tl.load(keys + key, mask=key < num_keys, other=0) != 0
        hole = tl.minimum(hole, tl.min(tl.where((key >= first) & ~seen, key, last), 0))
    runs += tl.program_id(0) * 3
    tl.store(runs, first)
    tl.store(runs + 1, last)
    tl.store(runs + 2, hole)


def key_runs(keys: Tensor) -> Tensor:
    """Of each row of keys: the first visible one, past the last, past the first unbroken run of them.

    A padded batch is one run, so that only tiles at its ends have to look at single keys.

    Args:
        keys: uint8, contiguous, (B or 1, N), not 0 where visible.

    Returns:
        int32, (B or 1, 3).
    """
    batch, num_keys = keys.shape
    runs = torch.empty(batch, 3, dtype=torch.int32, device=keys.device)
    launch(key_runs_kernel, (batch,), keys, runs, num_keys, BLOCK=1024)
    return runs


class Call:
    """One attention call as the kernels see it."""

    def __init__(self, problem: AttentionProblem, *, steady: bool = True) -> None:
        """steady: whether kernels may rely on a common level a head where they can; see `Rule.keyed`."""
        self.problem = problem
        self.batch, self.heads, self.num_queries, self.key_size = problem.query.shape
        self.key_heads, self.num_keys, self.value_size = problem.value.shape[1:]
        self.sizes = Sizes(self.heads, problem.group, self.num_queries, self.num_keys)
        self.blocks = {
            "BLOCK_D": power_of_two(self.key_size),
            "BLOCK_E": power_of_two(self.value_size),
        }
        self.rule = _rule_of(problem, steady=steady)
        self.steady = self.key_factor = self.level = None
        if self.rule.keyed and problem.key_bias is not None:
            key_bias = problem.key_bias.float().contiguous()
            low, high = key_bias.aminmax(dim=-1, keepdim=True)
            self.steady = high - low < STEADY
            self.key_factor = torch.exp(key_bias - high)
            self.level = high

    def tile_shape(self, kernel: str) -> TileShape:
        """The tile shape of a kernel for these head sizes, this dtype and device."""
        query = self.problem.query
        size = max(self.blocks.values())
        shape = _tile_shape(kernel, size, self.rule, query.dtype, query.device)
        if kernel == "decode":  # the rows are the queries that share their keys
            shape = replace(shape, block_m=power_of_two(self.problem.group * self.num_queries))
        return shape

    def rules(self) -> list[Rule]:
        """The rules to launch a kernel with, one after the other; see `Rule.keyed`."""
        if self.steady is None:
            return [self.rule]
        return [self.rule, _rule_of(self.problem, steady=False)]

    def query_grid(self, shape: TileShape) -> tuple[int]:
        """One program a query head and tile of queries."""
        return (self.batch * self.heads * ceil_div(self.num_queries, shape.block_m),)

    def key_grid(self, shape: TileShape) -> tuple[int]:
        """One program a key/value head and tile of keys."""
        return (self.batch * self.key_heads * ceil_div(self.num_keys, shape.block_n),)

    def bundle(self, one: Tensor, other: Tensor) -> int:
        """Heads at a time for programs that read all rows of two (B, heads, length, size) tensors.

        Query heads if the tensors are the keys' and values', key/value heads if they are the queries'.
        """
        heads, length = one.shape[1:3]
        pair = length * (one.shape[3] + other.shape[3]) * one.element_size()
        if heads == self.key_heads:
            return max(1, _BUNDLE_BYTES // pair) * self.sizes.group
        return max(1, _BUNDLE_BYTES // (pair * self.sizes.group))

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor (B, *shape) on the device of the query."""
        return torch.empty(self.batch, *shape, dtype=dtype, device=self.problem.query.device)

    def tiles(self, tensor: Tensor, rows: int) -> TensorDescriptor:
        """Descriptor of tiles of a (B, heads, length, size) tensor, `rows` by the whole size.

        The size is rounded up to a power of two; loads outside the tensor are zero.
        """
        return describe(TensorDescriptor, tensor, (1, 1, rows, power_of_two(tensor.shape[-1])))

    @cached_property
    def terms(self) -> Terms:
        """What the problem adds to scores and weights."""
        problem, ranges = self.problem, self.problem.ranges
        mask = None if problem.mask is None else problem.mask.view(torch.uint8)
        start = end = None
        if ranges is not None:
            start = ranges.start.to(torch.int32).contiguous()
            end = ranges.end.to(torch.int32).contiguous()
        keys = shown_keys(problem)
        runs = None if keys is None else key_runs(keys)
        bias, sinks = problem.bias, problem.sinks
        bias_strides, mask_strides = element_strides(bias, 4), element_strides(mask, 4)
        sinks_strides = element_strides(sinks, 3)
        return Terms(
            gain=contiguous_float(problem.gain),
            key_bias=contiguous_float(problem.key_bias),
            key_factor=self.key_factor,
            level=self.level,
            bias=bias,
            bias_batch=bias_strides[0],
            bias_head=bias_strides[1],
            bias_query=bias_strides[2],
            bias_key=bias_strides[3],
            mask=mask,
            mask_batch=mask_strides[0],
            mask_head=mask_strides[1],
            mask_query=mask_strides[2],
            mask_key=mask_strides[3],
            sinks=sinks,
            sinks_batch=sinks_strides[0],
            sinks_head=sinks_strides[1],
            sinks_query=sinks_strides[2],
            start=start,
            end=end,
            range_batch=element_strides(start, 1)[0],
            keys=keys,
            keys_batch=element_strides(keys, 1)[0],
            runs=runs,
            runs_batch=element_strides(runs, 1)[0],
            left=problem.sliding_window,
            right=1 if problem.is_causal else problem.sliding_window,
            cap=problem.softcap,
            seed=problem.seed if problem.dropout > 0.0 else None,
            keep_scale=1.0 / (1.0 - problem.dropout) if problem.dropout < 1.0 else 0.0,
        )
