"""Calls that do little but allocate tensors and launch kernels, done again from memory.

Which kernels a call launches, with which grids and numbers, follows from its options and from the
shapes, strides and types of its tensors. A training step asks the same of every layer, and working it
out takes the host longer than small kernels take the GPU. So the second of two calls that look alike is
recorded, and those after it repeat what was recorded with tensors of their own.

A call is repeated only if the recording saw all that it did: allocations, views, copies, and launches
through `ops.triton.host.launch`. One that runs other operations of PyTorch, reads a number from the
device or keeps a tensor for later is evaluated every time.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

#: Bytes; what bulk copies ask of addresses and strides, and what compiled kernels rely on.
ALIGNMENT = 16
# Remembered calls of a function; with so many kinds of calls none is likely to come again.
_MOST_CALLS = 1024
_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
}
_ZEROS = {_aten.zeros.default, _aten.new_zeros.default}
# They compute nothing; what they return is told by its address.
_VIEWS = {
    _aten.view.default,
    _aten.view.dtype,
    _aten.alias.default,
    _aten.detach.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.unbind.int,
}
_ZEROS_AT_ONCE = 1024
_zeros: dict[Any, list[Tensor]] = {}
_thread = threading.local()

#: Something made of the tensors of a call.
_Maker = Callable[[Sequence[Any]], Any]


def current() -> Recording | None:
    """The recording that this thread is making."""
    return getattr(_thread, "recording", None)


class Repeated:
    """A function of tensors and options that is repeated from memory where that is possible.

    Args:
        function: function(*tensors, *options) returns new tensors, one or a tuple. What it does depends
            on the options, on what the tensors look like and on `state` alone.
        state: whatever else it looks at; hashable.
    """

    def __init__(self, function: Callable[..., Any], state: Callable[[], Any]) -> None:
        self._function = function
        self._state = state
        # What answers a call, by what it looks like.
        self._calls: dict[Any, Callable[[Sequence[Any], Sequence[Any]], Any]] = {}

    def __call__(self, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
        key: list[Any] = [self._state(), options]
        for tensor in tensors:
            if tensor is None:
                key.append(None)
            else:
                is_aligned = tensor.data_ptr() % ALIGNMENT == 0
                looks = (
                    tensor.shape,
                    tensor.stride(),
                    tensor.dtype,
                    tensor.get_device(),
                    is_aligned,
                )
                key.append(looks)
        call = tuple(key)
        answer = self._calls.get(call)
        if answer is None:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            self._calls[call] = functools.partial(self._record, call)
            answer = self._evaluate
        return answer(tensors, options)

    def _evaluate(self, tensors: Sequence[Any], options: Sequence[Any]) -> Any:
        return self._function(*tensors, *options)

    def _record(self, call: Any, tensors: Sequence[Any], options: Sequence[Any]) -> Any:
        with Recording(tensors) as recording:
            outputs = self._evaluate(tensors, options)
        self._calls[call] = recording.repetition(outputs) or self._evaluate
        return outputs


class Recording(TorchDispatchMode):
    """What happens between entering and leaving it.

    Args:
        inputs: the tensors that the recorded call is given.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._is_whole = True
        self._allocations: list[tuple[Any, ...]] = []
        # Launches and copies: a function and what makes its arguments.
        self._steps: list[tuple[Callable[..., Any], _Maker]] = []
        # Kept to the end, so that no two of them have the same address.
        self._tensors: list[Tensor | None] = []
        for tensor in inputs:
            if tensor is None:
                self._tensors.append(None)
            else:
                self._add(tensor)

    def __enter__(self) -> Recording:
        _thread.recording = self
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        _thread.recording = None
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY or func in _ZEROS:
            made: tuple[Any, ...] = (torch.empty_strided, (result.shape, result.stride()))
            if func in _ZEROS:
                made = (_zero if result.numel() == 1 else torch.zeros), (result.shape,)
            self._allocations.append((*made, result.dtype, result.device))
            self._add(result)
        elif func is _aten.copy_.default:
            target, source = map(self._view, args[:2])
            self._steps.append((Tensor.copy_, lambda tensors: (target(tensors), source(tensors))))
        elif func not in _VIEWS:
            self._is_whole = False
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded meanwhile."""
        _thread.recording = None
        with _disable_current_modes():
            yield
        _thread.recording = self

    def launched(self, run: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """run(*arguments) has been launched: tensors, tuples with tensors, descriptors, constants."""
        self._steps.append((run, self._sequence(arguments)))

    def _sequence(self, arguments: Sequence[Any]) -> _Maker:
        constants = list(arguments)
        makers = []
        for place, argument in enumerate(arguments):
            if (maker := self._argument(argument)) is not None:
                constants[place] = None
                makers.append((place, maker))

        def make(tensors: Sequence[Any]) -> list[Any]:
            made = constants.copy()
            for place, maker in makers:
                made[place] = maker(tensors)
            return made

        return make

    def _argument(self, argument: Any) -> _Maker | None:
        """`None` for a constant."""
        if isinstance(argument, Tensor):
            return self._start(argument)
        if isinstance(base := getattr(argument, "base", None), Tensor):
            start, kind, fields = self._start(base), type(argument), vars(argument) | {"base": None}
            return lambda tensors: descriptor_at(start(tensors), kind, fields)
        if isinstance(argument, tuple) and any(isinstance(part, Tensor) for part in argument):
            parts, kind = self._sequence(argument), getattr(argument, "_make", tuple)
            return lambda tensors: kind(parts(tensors))
        return None

    def _start(self, tensor: Tensor) -> _Maker:
        """A tensor that starts at the same place, which is all that a kernel sees of it."""
        slot, ahead = self._slot(tensor)
        seen, dtype = self._tensors[slot], tensor.dtype
        if seen is None or (seen.dtype == dtype and ahead == 0):
            return operator.itemgetter(slot)
        if ahead > 0:
            return self._view(tensor)
        self._is_whole &= seen.element_size() == tensor.element_size()
        return lambda tensors: tensors[slot].view(dtype)

    def _view(self, tensor: Tensor) -> _Maker:
        slot, ahead = self._slot(tensor)
        seen, shape, strides = self._tensors[slot], tensor.shape, tensor.stride()
        self._is_whole &= seen is not None and seen.dtype == tensor.dtype
        places = ahead // tensor.element_size()

        def make(tensors: Sequence[Any]) -> Any:
            seen = tensors[slot]
            return seen.as_strided(shape, strides, seen.storage_offset() + places)

        return make

    def repetition(self, outputs: Tensor | tuple[Tensor, ...]) -> Callable[..., Any] | None:
        """repeat(tensors, options) does again what was recorded; `None` if that was not everything.

        Args:
            outputs: what the call returned.
        """
        is_single = isinstance(outputs, Tensor)
        slots = {_layout(x): slot for slot, x in enumerate(self._tensors) if x is not None}
        wanted = (outputs,) if isinstance(outputs, Tensor) else outputs
        returned = [slots.get(_layout(tensor), -1) for tensor in wanted]
        if not self._is_whole or -1 in returned:
            return None
        allocations, steps = self._allocations, self._steps

        def repeat(inputs: Sequence[Any], options: Sequence[Any]) -> Any:
            tensors = [*inputs]
            for make, sizes, dtype, device in allocations:
                tensors.append(make(*sizes, dtype=dtype, device=device))
            for run, arguments in steps:
                run(*arguments(tensors))
            return tensors[returned[0]] if is_single else tuple([tensors[i] for i in returned])

        return repeat

    def _add(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)
        if tensor.numel() > 0:
            self._slot(tensor)

    def _slot(self, tensor: Tensor) -> tuple[int, int]:
        """Which of the tensors holds the start of another one, and how many bytes behind its own."""
        address = tensor.data_ptr()
        inside = [
            (slot, address - seen.data_ptr())
            for slot, seen in enumerate(self._tensors)
            if seen is not None and 0 <= address - seen.data_ptr() < _span(seen)
        ]
        # Operands may be slices of one projection, which start at places of their own.
        found = [place for place in inside if place[1] == 0] or inside
        if len(found) != 1:
            self._is_whole = False
            return 0, 0
        return found[0]


def descriptor_at(base: Tensor, kind: type, fields: dict[str, Any]) -> Any:
    """A tile descriptor of a class of Triton's, without the checks of its constructor.

    Args:
        fields: its attributes, `base` left open.
    """
    made: Any = object.__new__(kind)
    made.__dict__.update(fields)
    made.base = base
    return made


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    steps = (
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (sum(steps) + 1) * tensor.element_size()


def _zero(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one zero. Many are cleared at once, on the stream that they are used on."""
    # A graph clears its own each time that it runs.
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(shape, dtype=dtype, device=device)
    kind = (torch._C._cuda_getCurrentRawStream(device.index), shape, dtype, device)
    try:
        return _zeros[kind].pop()
    except (KeyError, IndexError):
        # In rows, for the sake of the addresses.
        rows = torch.zeros(_ZEROS_AT_ONCE, ALIGNMENT, dtype=dtype, device=device)
        _zeros[kind] = [*rows[:, :1].reshape(-1, *shape).unbind()]
        return _zeros[kind].pop()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
