"""From an `AttentionProblem` to kernel arguments: tile descriptors, terms, compile-time choices."""

from __future__ import annotations

from dataclasses import dataclass
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
from .tiles import EXP, HILL, SQUARE, Rule, Terms, mix

#: Whether kernels are compiled (and may hold inline assembly), not interpreted.
COMPILED = isinstance(mix, JITFunction)

_KINDS = {"hill": HILL.value, "square": SQUARE.value, "exp": EXP.value}
_ALIGNMENT = 16  # bytes; what the bulk copies of tile descriptors ask of addresses and strides


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
    ("decode", 128): TileShape(16, 64, 4, 3),
    ("decode", 256): TileShape(16, 32, 4, 3),
}
# What beats them where weights carry an additive term, and where that depends on the key alone.
_SHIFTED = _PLAIN | {("forward", 64): TileShape(128, 64, 4, 3)}
_KEYED = _SHIFTED | {
    ("forward", 128): TileShape(128, 64, 8, 3),
    ("backward_query", 64): TileShape(64, 64, 4, 2),
}
# Wherever there is less shared memory; and for float32, whose exact products fill registers (Triton
# 3.6 miscompiles tiles of 16 by 16 with 8 warps).
_SMALL = {64: TileShape(64, 32, 4, 2), 128: TileShape(32, 32, 4, 2), 256: TileShape(16, 32, 4, 1)}
_EXACT = {64: TileShape(32, 32, 8, 1), 128: TileShape(16, 32, 4, 1), 256: TileShape(16, 16, 4, 1)}
# The interpreter runs one program at a time: large tiles are fastest, these still make several of them.
_INTERPRETED = TileShape(32, 32, 4, 1)
_LARGE_SHARED_MEMORY = 220 * 1024  # bytes


def tile_shape(kernel: str, call: Call) -> TileShape:
    """The tile shape of a kernel for a call's head sizes, dtype and device."""
    problem = call.problem
    size = max(64, call.block_d, call.block_e)
    if not COMPILED:
        shape = _INTERPRETED
    elif problem.query.dtype == torch.float32:
        shape = _EXACT[size]
    elif call.wide or _shared_memory(problem.query.device) < _LARGE_SHARED_MEMORY:
        shape = _SMALL[size]
    elif call.rule.keyed.value:
        shape = _KEYED[kernel, size]
    else:
        shape = (_SHIFTED if call.shifted else _PLAIN)[kernel, size]
    if kernel == "decode":
        rows = max(16, triton.next_power_of_2(problem.group * call.num_queries))
        shape = TileShape(rows, shape.block_n, shape.num_warps, shape.num_stages)
    return shape


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may use."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _stride(tensor: Tensor | None, dimension: int) -> int:
    """The stride in elements, 0 where the dimension broadcasts."""
    if tensor is None or tensor.shape[dimension] == 1:
        return 0
    return tensor.stride(dimension)


def _contiguous_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


class Call:
    """One attention call as the kernels see it."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        self.batch, self.heads, self.num_queries, self.key_size = problem.query.shape
        self.key_heads, self.num_keys, self.value_size = problem.value.shape[1:]
        self.block_d = max(16, triton.next_power_of_2(self.key_size))
        self.block_e = max(16, triton.next_power_of_2(self.value_size))

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor (B, *shape) on the device of the query."""
        return torch.empty(self.batch, *shape, dtype=dtype, device=self.problem.query.device)

    def tiles(self, tensor: Tensor, rows: int) -> TensorDescriptor:
        """Descriptor of tiles of a (B, heads, length, size) tensor, `rows` by the whole size.

        The size is rounded up to a power of two; loads outside the tensor are zero. A tensor whose
        strides or address a descriptor cannot express is copied.
        """
        unit = _ALIGNMENT // tensor.element_size()
        strides = [
            stride if size > 1 else unit
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        ]
        aligned = tensor.data_ptr() % _ALIGNMENT == 0
        if (
            not aligned
            or tensor.stride(-1) != 1
            or any(stride % unit or stride == 0 for stride in strides)
        ):
            *lead, size = tensor.shape
            padded = tensor.new_empty(*lead, triton.cdiv(size, unit) * unit)
            padded[..., :size] = tensor
            strides = list(padded.stride()[:-1])
            tensor = padded[..., :size]
        block = max(16, triton.next_power_of_2(tensor.shape[-1]))
        return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, block])

    @cached_property
    def terms(self) -> Terms:
        """What the problem adds to scores and weights."""
        problem, ranges = self.problem, self.problem.ranges
        mask = None if problem.mask is None else problem.mask.view(torch.uint8)
        start = end = keys = None
        if ranges is not None:
            start, end = (
                ranges.start.to(torch.int32).contiguous(),
                ranges.end.to(torch.int32).contiguous(),
            )
            keys = None if ranges.keys is None else ranges.keys.contiguous().view(torch.uint8)
        bias, sinks = problem.bias, problem.sinks
        return Terms(
            gain=_contiguous_float(problem.gain),
            key_bias=_contiguous_float(problem.key_bias),
            bias=bias,
            bias_batch=_stride(bias, 0),
            bias_head=_stride(bias, 1),
            bias_query=_stride(bias, 2),
            bias_key=_stride(bias, 3),
            mask=mask,
            mask_batch=_stride(mask, 0),
            mask_head=_stride(mask, 1),
            mask_query=_stride(mask, 2),
            mask_key=_stride(mask, 3),
            sinks=sinks,
            sinks_batch=_stride(sinks, 0),
            sinks_head=_stride(sinks, 1),
            sinks_query=_stride(sinks, 2),
            start=start,
            end=end,
            range_batch=_stride(start, 0),
            keys=keys,
            keys_batch=_stride(keys, 0),
            left=problem.sliding_window,
            right=1 if problem.is_causal else problem.sliding_window,
            cap=problem.softcap,
            seed=problem.seed if problem.dropout > 0.0 else None,
            keep_scale=1.0 / (1.0 - problem.dropout) if problem.dropout < 1.0 else 0.0,
        )

    @property
    def shifted(self) -> bool:
        """Whether rows carry a running maximum of their additive log-weights."""
        problem = self.problem
        return (
            problem.response.kind != "hill"
            or problem.key_bias is not None
            or problem.bias is not None
        )

    @property
    def plain(self) -> bool:
        """Whether tiles take the short path: Hill response of power 1 of a bare product."""
        return (
            not self.shifted
            and self.problem.response.kind == "hill"
            and self.problem.response.power == 1.0
            and self.problem.softcap is None
        )

    @property
    def wide(self) -> bool:
        """Whether weights outgrow float16 (z² is unbounded), so that they meet the values in tf32."""
        return self.problem.query.dtype == torch.float16 and self.problem.response.kind == "square"

    @cached_property
    def rule(self) -> Rule:
        """The compile-time choices."""
        problem, response = self.problem, self.problem.response
        hill = response.kind == "hill"
        half = problem.query.dtype == torch.float16
        choices = {
            "kind": _KINDS[response.kind],
            "power": float(response.power),
            "epsilon": float(response.epsilon),
            "limit": response.limit(torch.float32),
            "threshold": threshold(problem.dropout),
            "plain": self.plain,
            # Extreme scales would overflow, a learned one may become extreme, and gradients without
            # the scale sink below the range of float16.
            "folded": (self.plain or response.kind == "square")
            and not half
            and problem.softcap is None
            and problem.gain is None
            and 1e-4 <= abs(problem.scale) <= 1e4,
            "shifted": self.shifted,
            "keyed": self.shifted and response.kind != "exp" and problem.bias is None,
            "masked": problem.mask is not None
            or (problem.ranges is not None and problem.ranges.keys is not None),
            "lift": 2.0**14 if half and hill else 1.0,
            "wide": self.wide,
            "precision": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "fast": COMPILED and torch.version.hip is None,
            "interpreted": not COMPILED,
        }
        return Rule(**{name: tl.constexpr(value) for name, value in choices.items()})
