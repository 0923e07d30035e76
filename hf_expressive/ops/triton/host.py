"""Launches that cost the host little: what Triton works out anew at every call is remembered here.

A launch through `kernel[grid](…)` inspects, checks and compares everything about its arguments, which
takes longer than the kernels of a small layer. What it finds follows from a few properties of the
arguments: two calls that agree in them run the same compiled kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ..recording import ALIGNMENT, current, descriptor_at

#: Compiled kernels with the values of their compile-time parameters, by kernel, device and `_property`.
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}
# On AMD's GPUs kernels are compiled for the size of a tensor's memory, too.
_REMEMBERS = torch.version.hip is None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`.

    Args:
        kernel: a jitted function.
        grid: one to three sizes.
        arguments: for its first parameters; tile descriptors made by `describe`, compile-time constants
            of a hashable class of their own only.
        options: for the other parameters, all compile-time constants, and Triton's own (`num_warps`, …).
    """
    recording = current()
    if recording is None:
        _launch(kernel, grid, arguments, options)
    else:
        with recording.paused():
            run, given = _launch(kernel, grid, arguments, options)
        recording.launched(run, given)


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Launches, and returns what does it again: a function and its arguments."""
    key = (kernel, _current_device(), *map(_property, arguments), *options, *options.values())
    known = _compiled.get(key)
    if known is not None:
        compiled, constants = known
        run = compiled[(*grid, 1, 1)]
        arguments = (*arguments, *constants)
        run(*arguments)
        return run, arguments
    run = functools.partial(kernel[grid], **options)
    compiled = run(*arguments)
    # What is interpreted, or emulated by a test, is none.
    if _REMEMBERS and isinstance(compiled, CompiledKernel):
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = compiled, tuple(options[name] for name in names)
    return run, arguments


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _property(argument: Any) -> Any:
    """What a kernel is compiled for: never less than Triton looks at."""
    kind = type(argument)
    if kind is int:
        if not -(2**31) <= argument < 2**31:
            return ("wide", argument % ALIGNMENT == 0)
        return 1 if argument == 1 else 0 if argument % ALIGNMENT == 0 else 2
    if argument is None:
        return None
    if isinstance(argument, Tensor):
        dtype = argument.dtype
        return dtype if argument.data_ptr() % ALIGNMENT == 0 else (dtype,)
    if kind is float or kind is bool:
        return kind
    if isinstance(argument, tuple):
        # Most of `Terms` is absent: a call for each would take as long as all the rest.
        return (kind, *[None if part is None else _property(part) for part in argument])
    # A descriptor made here, or a compile-time constant.
    return getattr(argument, "property", argument)


@functools.lru_cache(maxsize=4096)
def _fields(
    kind: type,
    dtype: torch.dtype,
    shape: torch.Size,
    strides: tuple[int, ...],
    block: tuple[int, ...],
    layout: Callable[..., Any] | None,
) -> dict[str, Any] | None:
    """The attributes of a descriptor, checked by Triton; `None` where it cannot express the strides."""
    unit = ALIGNMENT // dtype.itemsize
    *outer, last = strides
    for index, stride in enumerate(outer):
        if shape[index] == 1:  # it is never taken and may be anything
            outer[index] = unit
        elif stride % unit or stride == 0:
            return None
    if last != 1:
        return None
    extra = () if layout is None else (layout(block, dtype),)
    made = kind(torch.empty(0, dtype=dtype), [*shape], [*outer, 1], [*block], *extra)
    return vars(made) | {"property": (kind, dtype, block, layout)}


def describe(
    kind: type, tensor: Tensor, block: tuple[int, ...], layout: Callable[..., Any] | None = None
) -> Any:
    """A tile descriptor; a tensor whose strides or address it cannot express is copied.

    Args:
        kind: `TensorDescriptor`, of Triton or of Gluon. block: sizes of a tile.
        layout: layout(block, dtype) makes what Gluon's descriptors want to know of shared memory.
    """
    fields = _fields(kind, tensor.dtype, tensor.shape, tensor.stride(), block, layout)
    if fields is None or tensor.data_ptr() % ALIGNMENT:
        unit = ALIGNMENT // tensor.element_size()
        *lead, size = tensor.shape
        padded = tensor.new_empty(*lead, -(-size // unit) * unit)[..., :size]
        return describe(kind, padded.copy_(tensor), block, layout)
    return descriptor_at(tensor, kind, fields)
