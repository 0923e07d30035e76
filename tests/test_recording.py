"""Calls repeated from memory: the same bits as calls that are evaluated, and only where that is sure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gluon_machine import launcher
from kernel_device import DEVICE, needs_gpu, needs_interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_expressive.ops import expressive_attention, hopper, library
from hf_expressive.ops.recording import Recording, Repeated, current
from hf_expressive.ops.triton import host

pytestmark = pytest.mark.usefixtures("poisoned")

BATCH, HEADS, KEY_HEADS, LENGTH, SIZE = 1, 2, 1, 40, 16


class Counted:
    """A function that counts how often it is evaluated."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *inputs: Any) -> Any:
        self.calls += 1
        return self.function(*inputs)


def repeated(function: Callable[..., Any]) -> tuple[Callable[..., Any], Counted]:
    """The function, called as before but repeated where possible, and the count of its evaluations."""
    counted = Counted(function)
    memory = Repeated(counted, lambda: None)

    def call(*inputs: Any) -> Any:
        tensors = [value for value in inputs if value is None or isinstance(value, Tensor)]
        return memory(tensors, inputs[len(tensors) :])

    return call, counted


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def arguments(**changes: Any) -> dict[str, Any]:
    """Fresh arguments of the forward operator, in its order."""
    shown = torch.rand(BATCH, LENGTH, device=DEVICE) < 0.7
    end = torch.arange(1, LENGTH + 1, device=DEVICE, dtype=torch.int32)[None]
    known = {
        "gain": lambda: random(HEADS).exp(),
        "key_bias": lambda: random(BATCH, KEY_HEADS, LENGTH),
        "bias": lambda: random(1, HEADS, LENGTH, LENGTH),
        "mask": lambda: random(BATCH, 1, LENGTH, LENGTH) > 0,
        "start": lambda: torch.zeros_like(end),
        "end": lambda: end,
        "keys": lambda: shown,
        "sinks": lambda: random(1, HEADS, 1),
        "seed": lambda: torch.randint(2**40, (1,), device=DEVICE),
    }
    wanted = changes.pop("tensors", ())
    return {
        "query": random(BATCH, HEADS, LENGTH, SIZE),
        "key": random(BATCH, KEY_HEADS, LENGTH, SIZE),
        "value": random(BATCH, KEY_HEADS, LENGTH, SIZE),
        **{name: make() if name in wanted else None for name, make in known.items()},
        "kind": "hill",
        "power": 1.0,
        "epsilon": 0.0,
        "scale": 0.25,
        "is_causal": True,
        "sliding_window": -1,
        "softcap": 0.0,
        "dropout": 0.0,
        "impl": "triton",
        **changes,
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "power 2, window": {"power": 2.0, "sliding_window": 20},
    "gain and sinks": {"tensors": ("gain", "sinks")},
    "bias, softcap": {"tensors": ("bias",), "softcap": 3.0},
    "mask": {"tensors": ("mask",), "is_causal": False},
    "ranges": {"tensors": ("start", "end"), "is_causal": False},
    "keys": {"tensors": ("start", "end", "keys"), "is_causal": False},
    "dropout": {"tensors": ("seed",), "dropout": 0.3},
    "one query": {"query": lambda: random(BATCH, HEADS, 1, SIZE)},
}
#: They run operations of PyTorch: the first asks for the largest bias of a head.
EVALUATED: dict[str, dict[str, Any]] = {
    "key bias": {"tensors": ("key_bias",), "kind": "square", "epsilon": 0.1},
    "blockwise": {"impl": "blockwise"},
}


def fresh(case: dict[str, Any]) -> list[Any]:
    made = arguments(**case)
    return [value() if callable(value) else value for value in made.values()]


def equal(found: Any, wanted: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", [*CASES, *EVALUATED])
def test_repeated_calls_give_the_bits_of_evaluated_ones(name: str) -> None:
    case = (CASES | EVALUATED)[name]
    forward, forwards = repeated(library._compute)
    backward, backwards = repeated(library._compute_backward)
    for _ in range(5):
        given = fresh(case)
        out, log_normalizer = forward(*given)
        assert equal((out, log_normalizer), library._compute(*given))
        grad = torch.randn_like(out)
        wanted = (given[4] is not None, given[5] is not None)
        given = [grad, out, log_normalizer, *given, *wanted]
        assert equal(backward(*given), library._compute_backward(*given))
    calls = 2 if name in CASES else 5
    assert (forwards.calls, backwards.calls) == (calls, calls)


@needs_interpreter
@pytest.mark.parametrize("name", ["causal", "shared sums", "documents"])
def test_the_hopper_kernels_are_repeated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the machine that stands for such a GPU; the whole of a forward and of a backward pass."""
    from hf_expressive.ops.hopper import gradient
    from hf_expressive.ops.hopper import launch as hopper_launch

    monkeypatch.setattr(hopper_launch, "forward_kernel", launcher("forward_kernel", 1))
    monkeypatch.setattr(gradient, "backward_kernel", launcher("backward_kernel", 2))
    monkeypatch.setattr(gradient, "is_shared", lambda _: name == "shared sums")
    monkeypatch.setattr(hopper, "has_own_backward", lambda _: True)
    forward, forwards = repeated(library._compute)
    backward, backwards = repeated(library._compute_backward)
    length = 200
    for turn in range(3):
        query, key, value, grad = (
            torch.randn(1, length, heads, 64, dtype=torch.bfloat16).transpose(1, 2)
            for heads in (2, 1, 1, 2)
        )
        options = {"query": query, "key": key, "value": value, "impl": "hopper"}
        given = fresh(options)
        if name == "documents":
            position = torch.arange(length, dtype=torch.int32)[None]
            given[7], given[8] = position // (50 + turn) * (50 + turn), position + 1
        out, log_normalizer = forward(*given)
        assert equal((out, log_normalizer), library._compute(*given))
        given = [grad, out, log_normalizer, *given, False, False]
        assert equal(backward(*given), library._compute_backward(*given))
    assert (forwards.calls, backwards.calls) == (2, 2)


def test_what_looks_different_is_not_a_repetition() -> None:
    forward, forwards = repeated(library._compute)
    shapes: list[dict[str, Any]] = [
        {},
        {"scale": 0.5},
        {"is_causal": False},
        {"tensors": ("gain",)},
        {"query": lambda: random(BATCH, HEADS, LENGTH + 1, SIZE)},
        {"query": lambda: random(BATCH, LENGTH, HEADS, SIZE).transpose(1, 2)},
        {"key": lambda: random(BATCH, KEY_HEADS, LENGTH, SIZE + 4)[..., :SIZE]},
    ]
    for turn in range(4):
        for number, case in enumerate(shapes):
            given = fresh(case)
            assert equal(forward(*given), library._compute(*given))
            assert forwards.calls == min(turn, 2) * len(shapes) + (number + 1 if turn < 2 else 0)


def test_addresses_that_kernels_are_not_compiled_for_are_other_calls() -> None:
    """The same shapes and strides at an address whose operand is copied first."""
    forward, forwards = repeated(library._compute)
    size = BATCH * HEADS * LENGTH * SIZE
    for calls in (1, 2, 2, 3, 4, 4):
        query = random(size + 1)[1 if calls > 2 else 0 :][:size].view(BATCH, HEADS, LENGTH, SIZE)
        given = fresh({"query": query})
        assert equal(forward(*given), library._compute(*given))
        assert forwards.calls == calls


def test_operands_of_one_projection_are_told_apart() -> None:
    forward, forwards = repeated(library._compute)
    for _ in range(4):
        heads = (HEADS, KEY_HEADS, KEY_HEADS)
        parts = random(BATCH, LENGTH, sum(heads), SIZE).transpose(1, 2).split(heads, dim=1)
        given = fresh(dict(zip(("query", "key", "value"), parts, strict=True)))
        assert equal(forward(*given), library._compute(*given))
    assert forwards.calls == 2


def test_tensors_at_one_place_are_not_mixed_up() -> None:
    """A recording cannot tell which of two equal operands a kernel was given."""
    forward, forwards = repeated(library._compute)
    for turn in range(4):
        given = fresh({})
        if turn < 2:
            given[2] = given[1]
        assert equal(forward(*given), library._compute(*given))
    assert forwards.calls == 4


def test_what_a_function_keeps_or_looks_up_is_evaluated() -> None:
    kept = random(4)

    def from_elsewhere(x: Tensor) -> Tensor:
        found = torch.empty_strided((4,), (1,), device=x.device)
        host.launch(Copied(), (1,), kept, found)
        return found

    def of_contents(x: Tensor) -> Tensor:
        return x.new_zeros(int(x[0]))

    for function in (from_elsewhere, of_contents):
        forward, evaluated = repeated(function)
        for size in (1.0, 2.0, 3.0, 4.0):
            x = torch.full((4,), size, device=DEVICE)
            assert torch.equal(forward(x), function(x))
        assert evaluated.calls == 4


class Copied:
    """Stands for a kernel, which knows of a tensor where it starts: copies the first to the second."""

    arg_names = ("source", "target")

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(source: Tensor, target: Tensor) -> None:
            target.view(-1)[: source.numel()].copy_(source)

        return run


def test_single_tensors_and_zeros_are_repeated() -> None:
    def function(x: Tensor) -> Tensor:
        zeros = x.new_zeros(2, 4)
        host.launch(Copied(), (1,), x, zeros[0])
        return zeros

    forward, evaluated = repeated(function)
    for _ in range(4):
        x = random(4)
        assert torch.equal(forward(x), torch.stack([x, torch.zeros_like(x)]))
    assert evaluated.calls == 2


def test_kernels_get_the_types_they_are_compiled_for() -> None:
    """Alone, in a tuple, and as another one of the same or another size."""
    given: list[torch.dtype] = []

    class Kernel:
        arg_names = ("alone", "pair")

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda alone, pair: given.extend([alone.dtype, pair[1].dtype])

    def function(shown: Tensor, x: Tensor) -> Tensor:
        host.launch(Kernel(), (1,), shown.view(torch.uint8), (3, x.view(torch.int32)))
        return x.new_empty(1)

    forward, evaluated = repeated(function)
    for _ in range(4):
        forward(random(4) > 0, random(4))
    assert given == [torch.uint8, torch.int32] * 4
    assert evaluated.calls == 2
    # Half as many of twice the size: evaluated.
    for _ in range(4):
        forward(random(4) > 0, random(4).double())
    assert given == [torch.uint8, torch.int32] * 8
    assert evaluated.calls == 6


def test_copies_are_repeated() -> None:
    """Of parts, transposed, broadcast and in other types; not from elsewhere, and no other writing."""
    kept = random(3, 4)

    def function(x: Tensor, y: Tensor) -> Tensor:
        made = x.new_empty(4, 6, dtype=torch.float64)
        made.copy_(y[:1].expand(4, 6))
        made[:, :3].copy_(x.t())
        return made

    def from_elsewhere(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y).t()[:3].copy_(kept)

    def added(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y).add_(1)

    for called, calls in ((function, 2), (from_elsewhere, 4), (added, 4)):
        forward, evaluated = repeated(called)
        for _ in range(4):
            given = random(3, 4), random(1, 6)
            assert torch.equal(forward(*given), called(*given))
        assert evaluated.calls == calls


def test_an_error_ends_a_recording() -> None:
    def function(x: Tensor) -> Tensor:
        if evaluated.calls == 2:
            raise ValueError("the second call fails")
        return x.new_zeros(3)

    forward, evaluated = repeated(function)
    forward(random(1))
    with pytest.raises(ValueError, match="second call"):
        forward(random(1))
    assert current() is None
    for _ in range(3):
        assert torch.equal(forward(random(1)), torch.zeros(3, device=DEVICE))
    assert evaluated.calls == 3


def test_settings_count() -> None:
    settings = [False]
    counted = Counted(lambda x: x.new_zeros(2))
    forward = Repeated(counted, lambda: settings[0])
    for wanted in (1, 2, 2):
        forward([random(1)], ())
        assert counted.calls == wanted
    settings[0] = True
    forward([random(1)], ())
    assert counted.calls == 3


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_expressive.ops.recording._MOST_CALLS", 8)
    forward = Repeated(lambda x: x.new_zeros(2), lambda: None)
    for length in range(1, 30):
        for _ in range(3):
            forward([random(length)], ())
        assert len(forward._calls) <= 8


class Watched(TorchDispatchMode):
    """Where it looks on, calls are evaluated."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@needs_gpu
@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("kv_heads", [16, 4])
def test_training_steps_repeat_on_a_gpu(
    impl: Any, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another stream and as a CUDA graph, too; `auto` is the Hopper path."""
    repeats = []
    repetition = Recording.repetition

    def counted(self: Recording, outputs: Any) -> Any:
        found = repetition(self, outputs)
        return found and (lambda *given: repeats.append(1) or found(*given))

    monkeypatch.setattr(Recording, "repetition", counted)

    def operands() -> list[Tensor]:
        return [
            torch.randn(2, 2048, heads, 64, device=DEVICE, dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (16, kv_heads, kv_heads)
        ]

    def step(given: list[Tensor]) -> list[Tensor]:
        out = expressive_attention(*given, is_causal=True, impl=impl)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), given)]

    def check(given: list[Tensor], found: list[Tensor]) -> None:
        with Watched():
            assert equal(found, step(given))

    for _ in range(5):
        given = operands()
        check(given, step(given))
    # Each of both passes is evaluated first, then recorded.
    assert len(repeats) == 2 * 3
    given = operands()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = step(given)
    torch.cuda.current_stream().wait_stream(side)
    check(given, found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(given)
    for _ in range(3):
        with torch.no_grad():
            for tensor, other in zip(given, operands(), strict=True):
                tensor.copy_(other)
        graph.replay()
        check(given, found)


@needs_gpu
def test_zeros_are_zero_on_every_stream() -> None:
    def function(x: Tensor) -> Tensor:
        return x.new_zeros(1, dtype=torch.int32)

    forward, evaluated = repeated(function)
    found = []
    for stream in [torch.cuda.current_stream(), torch.cuda.Stream()]:
        with torch.cuda.stream(stream):
            for _ in range(1500):
                zero = forward(random(4))
                assert zero.data_ptr() % 16 == 0
                found.append(zero.clone())
                zero.fill_(7)
    torch.cuda.synchronize()
    assert not torch.cat(found).any()
    assert evaluated.calls == 2
