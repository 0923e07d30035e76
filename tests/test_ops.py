"""The tensor functions: reference and blockwise against an independent formula, value and gradient."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import pytest
import torch
from allocations import Allocations
from tolerances import (
    SAME_IN_FLOAT64,
    assert_within_budget,
    largest_error,
    plain_attention,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_expressive.ops import KeyRanges, blockwise, expressive_attention, functional, library
from hf_expressive.ops.dropout import keep_mask
from hf_expressive.ops.functional import attend
from hf_expressive.ops.operator import _is_unobserved, operator
from hf_expressive.ops.response import Response

pytestmark = pytest.mark.usefixtures("poisoned")

IMPLEMENTATIONS = ("reference", "blockwise")


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with the package's tiles and with tiles smaller than the problem."""
    if request.param == "many tiles":
        monkeypatch.setattr(blockwise, "_TILE", 8)
        monkeypatch.setattr(blockwise, "_BLOCK_SCORES", 1)


# ---- cases ----------------------------------------------------------------------------------------
# A case is a size and a function that makes (arguments of `attend`, arguments of `plain_attention`)
# from them; both share the tensors that want a gradient.

Options = tuple[dict[str, Any], dict[str, Any]]
#: batch, heads, key/value heads, queries, keys, key size, value size
Size = tuple[int, int, int, int, int, int, int]
SIZE: Size = (2, 4, 2, 37, 37, 5, 3)
SHORT: Size = (2, 4, 2, 21, 37, 5, 3)
LONG: Size = (2, 4, 2, 37, 21, 5, 3)


def same(**options: Any) -> Options:
    return options, dict(options)


def aligned(size: Size, *, causal: bool = False, window: int | None = None) -> Tensor:
    """Visibility with the last query at the last key, (query, keys)."""
    queries, keys = size[3], size[4]
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < window
        visible &= -distance < window
    return visible


def static(size: Size, *, causal: bool = False, window: int | None = None) -> Options:
    ours = {"is_causal": causal, "sliding_window": window}
    return ours, {"visible": aligned(size, causal=causal, window=window)}


def biased(size: Size, *ones: int) -> Options:
    """A bias that is broadcast along the dimensions `ones`."""
    batch, heads, _, queries, keys, *_ = size
    full = (batch, heads, queries, keys)
    shape = [1 if dim in ones else length for dim, length in enumerate(full)]
    return same(bias=torch.randn(shape).double().requires_grad_())


def alibi(size: Size) -> Options:
    distance = torch.arange(size[3])[:, None] + size[4] - size[3] - torch.arange(size[4])
    slopes = 2.0 ** -torch.arange(1, size[1] + 1)
    bias = -slopes[None, :, None, None] * distance.abs()
    return {"bias": bias, "is_causal": True}, {"bias": bias, "visible": distance >= 0}


def masked(size: Size, kind: str) -> Options:
    batch, heads, _, queries, keys, *_ = size
    visible = torch.rand(batch, heads, queries, keys) < 0.6
    visible[0, 0, 0] = False  # a row that sees nothing
    if kind == "bool":
        return {"attention_mask": visible}, {"visible": visible}
    if kind == "int":
        return {"attention_mask": visible.long() * 3}, {"visible": visible}
    hidden = {"min": torch.finfo(torch.float32).min, "inf": -torch.inf, "-1e4": -1e4}[kind]
    additive = torch.randn(batch, heads, queries, keys)
    additive = additive.masked_fill(~visible, hidden)
    return {"attention_mask": additive}, {"bias": additive, "visible": visible}


def padded(size: Size, side: str) -> Options:
    """Causal with some keys of the first row padded away, as ranges."""
    batch, _, _, queries, keys, *_ = size
    real = torch.ones(batch, keys, dtype=torch.bool)
    holes = {"left": slice(0, 9), "right": slice(-9, None), "middle": slice(11, 14)}[side]
    real[0, holes] = False
    end = torch.arange(1, queries + 1, dtype=torch.int32)[None] + keys - queries
    ranges = KeyRanges(torch.zeros_like(end), end, real)
    return {"attention_mask": ranges}, {
        "visible": aligned(size, causal=True) & real[:, None, None, :]
    }


def packed(size: Size) -> Options:
    """Three sequences in one row, another cut in each row of the batch."""
    batch, _, _, queries, keys, *_ = size
    segment = torch.stack([torch.arange(keys) // (9 + 2 * row) for row in range(batch)])
    start = torch.stack([torch.searchsorted(row, row) for row in segment])
    end = torch.arange(1, queries + 1).expand(batch, queries)
    visible = aligned(size, causal=True) & (segment[:, :, None] == segment[:, None, :])
    return {"attention_mask": KeyRanges(start, end)}, {"visible": visible[:, None]}


def empty_ranges(size: Size) -> Options:
    """Ranges that reach beyond the keys on both sides, are empty, or are upside down."""
    start = torch.randint(-5, size[4] + 5, (size[0], size[3]))
    end = start + torch.randint(-8, 12, start.shape)
    keys = torch.arange(size[4])
    visible = (keys >= start[..., None]) & (keys < end[..., None])
    return {"attention_mask": KeyRanges(start.int(), end.int())}, {"visible": visible[:, None]}


def ranged_and_static(size: Size) -> Options:
    """Ranges, causality and a window at once: all of them hold."""
    ours, theirs = padded(size, "middle")
    window = aligned(size, causal=True, window=6)
    return {**ours, "is_causal": True, "sliding_window": 6}, {"visible": theirs["visible"] & window}


def sunk(size: Size, form: str) -> Options:
    shape = {
        "heads": (size[1],),
        "full": (size[0], size[1], size[3], 1),
        "query": (1, 1, size[3], 1),
    }
    return same(sinks=torch.randn(shape[form]).double().requires_grad_())


def sunk_and_empty(size: Size) -> Options:
    """Sinks where some rows see nothing: the output is zero, the gradient too."""
    ours, theirs = masked(size, "bool")
    sinks = torch.randn(size[1]).double().requires_grad_()
    return {**ours, "sinks": sinks}, {**theirs, "sinks": sinks}


def learned(size: Size) -> Options:
    return same(scale=(torch.rand(size[1]) + 0.5).double().requires_grad_())


def key_biased(size: Size) -> Options:
    key_bias = (3 * torch.randn(size[0], size[2], size[4])).double().requires_grad_()
    ours = {"key_bias": key_bias, "response": Response("square", epsilon=1e-5)}
    return ours, {"key_bias": key_bias, "kind": "square", "epsilon": 1e-5}


def softmax(size: Size) -> Options:
    ours, theirs = masked(size, "min")
    ours |= {"response": Response("exp"), "softcap": 2.0}
    return ours, {**theirs, "kind": "exp", "softcap": 2.0}


def mask_and_bias(size: Size) -> Options:
    """A float mask and a bias, which add."""
    ours, theirs = masked(size, "min")
    bias = biased(size, 0)[0]
    theirs = {"float_mask": theirs["bias"], "visible": theirs["visible"]}
    return ours | bias, theirs | bias


def everything(size: Size) -> Options:
    """Everything that may come together."""
    ours, theirs = mask_and_bias(size)
    for extra in (sunk(size, "heads"), learned(size), same(softcap=1.5)):
        ours, theirs = ours | extra[0], theirs | extra[1]
    ours |= {"response": Response("hill", power=2.0), "is_causal": True, "sliding_window": 7}
    visible = theirs["visible"] & aligned(size, causal=True, window=7)
    return ours, {**theirs, "power": 2.0, "visible": visible}


def hill(power: float) -> Options:
    return {"response": Response("hill", power=power)}, {"power": power}


CASES: dict[str, tuple[Size, Callable[[Size], Options]]] = {
    "plain": (SIZE, lambda size: same()),
    "heads": ((2, 4, 4, 37, 37, 5, 3), lambda size: same()),
    "one key/value head": ((2, 4, 1, 37, 37, 5, 3), lambda size: same()),
    "one query": ((2, 4, 2, 1, 37, 5, 3), lambda size: static(size, causal=True)),
    "one key": ((2, 4, 2, 37, 1, 5, 3), lambda size: same()),
    "one of everything": ((1, 1, 1, 1, 1, 1, 1), lambda size: same()),
    "wide": ((1, 2, 1, 19, 23, 40, 65), lambda size: same()),
    "causal": (SIZE, lambda size: static(size, causal=True)),
    "causal, more keys": (SHORT, lambda size: static(size, causal=True)),
    "causal, more queries": (LONG, lambda size: static(size, causal=True)),
    "window": (SIZE, lambda size: static(size, window=5)),
    "window of one": (SIZE, lambda size: static(size, window=1)),
    "window, more keys": (SHORT, lambda size: static(size, window=5)),
    "window, more queries": (LONG, lambda size: static(size, window=5)),
    "causal window": (SIZE, lambda size: static(size, causal=True, window=5)),
    "causal window, more keys": (SHORT, lambda size: static(size, causal=True, window=5)),
    "causal window, more queries": (LONG, lambda size: static(size, causal=True, window=5)),
    "softcap": (SIZE, lambda size: same(softcap=0.7)),
    "sinks": (SIZE, lambda size: sunk(size, "heads")),
    "sinks, full": (SIZE, lambda size: sunk(size, "full")),
    "sinks, a query": (SIZE, lambda size: sunk(size, "query")),
    "sinks, empty rows": (SIZE, sunk_and_empty),
    "bias": (SIZE, lambda size: biased(size)),
    "bias, batch": (SIZE, lambda size: biased(size, 0)),
    "bias, heads": (SIZE, lambda size: biased(size, 1)),
    "bias, query": (SIZE, lambda size: biased(size, 2)),
    "bias, keys": (SIZE, lambda size: biased(size, 3)),
    "bias, batch and query": (SIZE, lambda size: biased(size, 0, 2)),
    "bias, all": (SIZE, lambda size: biased(size, 0, 1, 2, 3)),
    "ALiBi": (SHORT, alibi),
    "mask, bool": (SIZE, lambda size: masked(size, "bool")),
    "mask, int": (SIZE, lambda size: masked(size, "int")),
    "mask, minimum": (SIZE, lambda size: masked(size, "min")),
    "mask, -inf": (SIZE, lambda size: masked(size, "inf")),
    "mask, -1e4": (SIZE, lambda size: masked(size, "-1e4")),
    "ranges, left padding": (SIZE, lambda size: padded(size, "left")),
    "ranges, right padding": (SHORT, lambda size: padded(size, "right")),
    "ranges, middle padding": (SIZE, lambda size: padded(size, "middle")),
    "ranges, packed": (SIZE, packed),
    "ranges, empty": (SIZE, empty_ranges),
    "ranges and static": (SIZE, ranged_and_static),
    "learned scale": (SIZE, learned),
    "number scale": (SIZE, lambda size: same(scale=1.0)),
    "power 0.5": (SIZE, lambda size: hill(0.5)),
    "power 2": (SIZE, lambda size: hill(2.0)),
    "power 4": (SIZE, lambda size: hill(4.0)),
    "square": (SIZE, key_biased),
    "softmax": (SIZE, softmax),
    "mask and bias": (SIZE, mask_and_bias),
    "everything": (SIZE, everything),
}


def operands(size: Size, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value as models hand them over: transposed views."""
    batch, heads, kv_heads, queries, keys, dim, value_dim = size
    shapes = [(batch, queries, heads, dim), (batch, keys, kv_heads, dim)]
    shapes.append((batch, keys, kv_heads, value_dim))
    return [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def value_and_gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The result of a function, then the gradients of all tensors that want one."""
    wanted = [*tensors, *(t for t in tree_leaves(options) if getattr(t, "requires_grad", False))]
    out = function(*tensors, **options)
    # Fixed weights of the outputs, which do not depend on the dtype.
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=generator).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, wanted, direction))


def cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same options with their floating tensors in another dtype."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        minimum = torch.finfo(dtype).min
        moved = value.detach().to(dtype)
        moved = torch.where(value <= torch.finfo(torch.float32).min, minimum, moved)
        return moved.requires_grad_(value.requires_grad)

    return {name: one(value) for name, value in options.items()}


def ours(impl: str) -> Callable[..., Tensor]:
    def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        options.setdefault("response", Response("hill"))
        out = attend(query, key, value, impl=impl, **options)  # type: ignore[call-overload]
        assert isinstance(out, Tensor)
        return out

    return function


def plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    options.setdefault("scale", query.shape[-1] ** -0.5)
    if (float_mask := options.pop("float_mask", None)) is not None:
        options["bias"] = options["bias"] + float_mask
    return plain_attention(query, key, value, **options)


NAMES = ("out", "query", "key", "value", "first option", "second option", "third option")


# ---- value and gradient ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_formula(impl: str, case: str, tiles: None) -> None:
    """In float64 every implementation equals the formula, value and every gradient."""
    size, make = CASES[case]
    mine, theirs = make(size)
    tensors = operands(size)
    actual = value_and_gradients(ours(impl), tensors, mine)
    expected = value_and_gradients(plain, tensors, theirs)
    assert len(actual) == len(expected)
    for name, one, other in zip(NAMES, actual, expected, strict=False):
        assert largest_error(one, other) < SAME_IN_FLOAT64, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", ["plain", "causal, more keys", "everything", "square", "softmax", "power 4", "sinks"]
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_budget(impl: str, case: str, dtype: torch.dtype, tiles: None) -> None:
    """In other dtypes the error is at most twice that of a plain implementation in that dtype."""
    size, make = CASES[case]
    mine, theirs = make(size)
    mine, theirs = cast(mine, dtype), cast(theirs, dtype)
    tensors = operands(size, dtype)
    # The reference starts from the rounded inputs.
    exact = value_and_gradients(
        plain,
        [tensor.detach().double().requires_grad_() for tensor in tensors],
        cast(theirs, torch.float64),
    )
    actual = value_and_gradients(ours(impl), tensors, mine)
    rounded = value_and_gradients(plain, tensors, theirs)
    for name, one, expected, other in zip(NAMES, actual, exact, rounded, strict=False):
        assert_within_budget(one, expected, other, name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl: str) -> None:
    """The gradients are the numerical ones, those of scale, bias, mask and sinks included."""
    size = (1, 4, 2, 3, 4, 2, 3)
    tensors = operands(size)
    options = [
        learned(size)[0]["scale"],
        biased(size, 1)[0]["bias"],
        sunk(size, "heads")[0]["sinks"],
    ]

    def function(*arguments: Tensor) -> Tensor:
        query, key, value, scale, bias, sinks = arguments
        return expressive_attention(
            *(query, key, value),
            scale=scale,
            attention_mask=bias,
            sinks=sinks,
            is_causal=True,
            softcap=3.0,
            power=2.0,
            impl=impl,  # type: ignore[arg-type]
        )

    assert torch.autograd.gradcheck(function, (*tensors, *options))
    if impl == "reference":
        assert torch.autograd.gradgradcheck(function, (*tensors, *options))


def test_second_derivative_is_refused() -> None:
    """Blockwise has a first derivative only, and says so instead of giving zero."""
    query, key, value = operands(SIZE)
    out = expressive_attention(query, key, value, impl="blockwise")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula"):
        gradient.sum().backward()


def test_forward_derivative_is_refused() -> None:
    """An operator without that derivative would give zero."""
    query, key, value = operands(SIZE)

    def derivative(impl: Any) -> Tensor:
        def function(query: Tensor) -> Tensor:
            return expressive_attention(query, key, value, impl=impl)

        _, result = torch.func.jvp(function, (query.detach(),), (query.detach(),))
        return result

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        derivative("blockwise")
    assert derivative("reference").abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [0, 3])
@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("batch", [0, 1])
def test_empty(impl: str, queries: int, keys: int, batch: int) -> None:
    tensors = operands((batch, 2, 1, queries, keys, 4, 5))
    out, *gradients = value_and_gradients(ours(impl), tensors, {"is_causal": True})
    assert out.shape == (batch, 2, queries, 5)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if keys == 0:
        assert (out == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("how", ["mask", "float mask", "ranges", "causal", "zero scores"])
@pytest.mark.parametrize("sink", [False, True])
def test_rows_without_weight(impl: str, how: str, sink: bool, tiles: None) -> None:
    """Exactly zero with exactly zero gradients."""
    size = (2, 2, 2, 20, 12, 4, 4)
    tensors = operands(size, torch.float32)
    options: dict[str, Any] = {}
    if sink:
        options["sinks"] = torch.randn(2).requires_grad_()
    empty = slice(0, 8)
    visible = torch.ones(1, 1, 20, 12, dtype=torch.bool)
    visible[:, :, empty] = False
    if how == "mask":
        options["attention_mask"] = visible
    elif how == "float mask":
        options["attention_mask"] = torch.zeros(1, 1, 20, 12).masked_fill(~visible, -3e38)
    elif how == "ranges":
        start = torch.where(torch.arange(20) < 8, 12, 0)[None]
        options["attention_mask"] = KeyRanges(start, torch.full_like(start, 12))
    elif how == "causal":
        options["is_causal"] = True
    else:
        tensors[0] = tensors[0].detach().index_fill(2, torch.arange(8), 0.0).requires_grad_()
    out, *gradients = value_and_gradients(ours(impl), tensors, options)
    assert (out[:, :, empty] == 0).all()
    assert (gradients[0][:, :, empty] == 0).all()
    assert out[:, :, 8:].abs().min() > 0
    assert all(gradient.isfinite().all() for gradient in gradients)
    # The keys hear nothing from those rows either: without them the gradients are the same.
    shorter = [tensors[0][:, :, 8:].detach().requires_grad_(), *tensors[1:]]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))[:, :, 8:]
    options = options if how == "causal" else {k: v for k, v in options.items() if k == "sinks"}
    out = ours(impl)(*shorter, **options)
    expected = torch.autograd.grad(out, shorter[1:], direction)
    for one, other in zip(gradients[1:3], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sink_of_minus_infinity(impl: str) -> None:
    """It is no sink, in rows that see nothing too."""
    options, _ = masked(SIZE, "bool")
    tensors = operands(SIZE)
    sinks = torch.full((SIZE[1],), -torch.inf, dtype=torch.float64, requires_grad=True)
    *actual, of_sinks = value_and_gradients(ours(impl), tensors, {**options, "sinks": sinks})
    expected = value_and_gradients(ours(impl), tensors, options)
    for one, other in zip(actual, expected, strict=True):
        assert largest_error(one, other) < SAME_IN_FLOAT64
    assert (of_sinks == 0).all()


# ---- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("power", [0.05, 0.5, 1.0, 2.0, 4.0, 50.0])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 300**0.5),
        (torch.float16, 6e4),
        (torch.bfloat16, 1e15),
        (torch.float32, 1e18),
        (torch.float64, 1e150),
    ],
    ids=str,
)
def test_huge_scores(impl: str, power: float, dtype: torch.dtype, size: float) -> None:
    """However large the scores, weights are at most 1: nothing overflows, nothing is NaN."""
    shape = (1, 2, 9, 1)
    tensors = [(torch.randn(shape, dtype=dtype).sign() * size).requires_grad_() for _ in range(2)]
    tensors.append(torch.randn(1, 2, 9, 3).to(dtype).requires_grad_())
    options = {"response": Response("hill", power=power), "scale": 1.0}
    out, *gradients = value_and_gradients(ours(impl), tensors, options)
    mean = tensors[2].double().mean(dim=2, keepdim=True).expand(out.shape)
    floor = 2.0 * torch.finfo(dtype).eps
    assert largest_error(out, mean.detach()) < max(floor, 1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("factor", [0.0, 1e-40, 1e-30, 1e-12, 1e-3])
def test_tiny_scores(impl: str, power: float, factor: float) -> None:
    """Scores down to zero: finite everywhere, and zero where there is no weight at all."""
    tensors = operands(SIZE, torch.float32)
    # Half of it on either side, so that the scores and not the operands are denormal.
    tensors[:2] = [(t.detach() * factor**0.5).requires_grad_() for t in tensors[:2]]
    out, *gradients = value_and_gradients(
        ours(impl), tensors, {"response": Response("hill", power=power)}
    )
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))
    assert out.abs().max() <= tensors[2].abs().max()
    without = (out == 0).all(dim=-1)
    assert (gradients[0][without] == 0).all()
    if factor <= 1e-40:
        assert without.all()
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gain_of_zero(impl: str) -> None:
    """A gain of exactly zero gives zero weight and a zero gradient, not NaN."""
    tensors = operands(SIZE)
    gain = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    mine = value_and_gradients(ours(impl), tensors, {"scale": gain})
    assert (mine[0][:, 0] == 0).all()
    expected = value_and_gradients(plain, tensors, {"scale": gain})
    for one, other in zip(mine, expected, strict=True):
        assert largest_error(one, other) < SAME_IN_FLOAT64


def test_sign_does_not_matter() -> None:
    """Parallel and antiparallel keys attract alike; an orthogonal key is not seen."""
    query = torch.tensor([[[[2.0, 0.0]]]])
    key = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]]])
    value = torch.eye(3)[None, None]
    out = expressive_attention(query, key, value)
    torch.testing.assert_close(out, torch.tensor([[[[0.5, 0.5, 0.0]]]]))


# ---- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", ["hill", "square"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout(impl: str, response: str, tiles: None) -> None:
    """From one seed every implementation drops the same weights, in both directions."""
    size, probability = SIZE, 0.3
    tensors = operands(size)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**32, (1,), dtype=torch.int64)
    head = torch.arange(size[0] * size[1]).view(size[0], size[1], 1, 1)
    rows, columns = torch.arange(size[3])[:, None], torch.arange(size[4])
    keep = keep_mask(seed, head, rows, columns, probability)
    mine: dict[str, Any] = {"dropout": probability}
    theirs = {"keep": keep, **mine}
    if response == "square":
        extra = key_biased(size)
        mine, theirs = mine | extra[0], theirs | extra[1]
    else:
        extra = sunk(size, "heads")
        mine, theirs = mine | extra[0], theirs | extra[1]
    torch.manual_seed(5)
    actual = value_and_gradients(ours(impl), tensors, mine)
    expected = value_and_gradients(plain, tensors, theirs)
    for name, one, other in zip(NAMES, actual, expected, strict=False):
        assert largest_error(one, other) < SAME_IN_FLOAT64, name


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_statistics(probability: float) -> None:
    """The share of kept weights is right, and independent between rows, columns, heads and seeds."""
    head, row, column = torch.arange(6).view(6, 1, 1), torch.arange(150)[:, None], torch.arange(150)
    masks = [keep_mask(torch.tensor([s]), head, row, column, probability) for s in (0, 1, 2**31)]
    keep = torch.stack(masks).double() - (1.0 - probability)
    deviation = (probability * (1.0 - probability) / keep.numel()) ** 0.5
    assert abs(keep.mean()) < 4 * deviation
    variance = probability * (1.0 - probability)
    for dim in range(4):
        neighbours = keep.narrow(dim, 1, keep.shape[dim] - 1) * keep.narrow(
            dim, 0, keep.shape[dim] - 1
        )
        correlation = neighbours.mean() / variance
        assert abs(correlation) < 5 / neighbours.numel() ** 0.5, f"dimension {dim}"


def test_dropout_expectation() -> None:
    """Averaged over seeds the output is the one without dropout."""
    query, key, value = (tensor.detach() for tensor in operands((1, 2, 2, 5, 9, 4, 3)))
    repeated = [tensor.expand(4000, -1, -1, -1) for tensor in (query, key, value)]
    out = expressive_attention(*repeated, dropout=0.4).mean(dim=0)
    assert largest_error(out, expressive_attention(query, key, value)[0]) < 0.08


# ---- what is refused ------------------------------------------------------------------------------

_Q, _K, _V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 3)
_BOUNDS = torch.zeros(2, 5, dtype=torch.int32)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("query", {"query": _Q[0]}),
    ("query", {"query": _Q.long()}),
    ("key", {"key": _K[0]}),
    ("key", {"key": _K.double()}),
    ("key", {"key": _K[:, :, :6]}),
    ("key", {"key": _K[..., :7]}),
    ("key", {"key": _K[:1], "value": _V[:1]}),
    ("value", {"value": _V.bool()}),
    ("value", {"value": _V[:, :1]}),
    ("heads", {"query": _Q[:, :3]}),
    ("heads", {"key": _K[:, :0], "value": _V[:, :0]}),
    ("scale", {"scale": torch.ones(3)}),
    ("scale", {"scale": torch.tensor(1.0)}),
    ("scale", {"scale": float("nan")}),
    ("scale", {"scale": float("inf")}),
    ("power", {"power": 0.0}),
    ("power", {"power": -1.0}),
    ("power", {"power": float("inf")}),
    ("power", {"power": float("nan")}),
    ("attention_mask", {"attention_mask": torch.ones(2, 7, dtype=torch.bool)}),
    ("attention_mask", {"attention_mask": torch.ones(2, 1, 5, 8)}),
    ("attention_mask", {"attention_mask": torch.ones(3, 1, 5, 7)}),
    ("attention_mask", {"attention_mask": torch.ones(2, 2, 5, 7)}),
    ("attention_mask", {"attention_mask": KeyRanges(_BOUNDS[:, :4], _BOUNDS[:, :4])}),
    ("attention_mask", {"attention_mask": KeyRanges(_BOUNDS[0], _BOUNDS[0])}),
    ("attention_mask", {"attention_mask": KeyRanges(_BOUNDS.float(), _BOUNDS)}),
    ("attention_mask", {"attention_mask": KeyRanges(_BOUNDS, _BOUNDS, torch.ones(2, 7))}),
    (
        "attention_mask",
        {"attention_mask": KeyRanges(_BOUNDS, _BOUNDS, torch.ones(2, 6, dtype=torch.bool))},
    ),
    (
        "attention_mask",
        {"attention_mask": KeyRanges(_BOUNDS, _BOUNDS, torch.ones(7, dtype=torch.bool))},
    ),
    ("bias", {"bias": torch.zeros(2, 4, 5, 6)}),
    ("bias", {"bias": torch.zeros(5, 7)}),
    ("bias", {"bias": torch.zeros(2, 4, 5, 7, dtype=torch.long)}),
    ("sliding_window", {"sliding_window": 0}),
    ("sliding_window", {"sliding_window": -1}),
    ("sliding_window", {"sliding_window": 2.5}),
    ("softcap", {"softcap": 0.0}),
    ("softcap", {"softcap": -1.0}),
    ("softcap", {"softcap": float("nan")}),
    ("softcap", {"softcap": float("inf")}),
    ("sinks", {"sinks": torch.zeros(3)}),
    ("sinks", {"sinks": torch.zeros(2, 4, 5)}),
    ("sinks", {"sinks": torch.zeros(2, 4, 5, 2)}),
    ("dropout", {"dropout": 1.0}),
    ("dropout", {"dropout": -0.1}),
    ("dropout", {"dropout": float("nan")}),
    ("impl", {"impl": "fast"}),
]


@pytest.mark.parametrize(
    ("name", "options"), REFUSED, ids=[f"{name} {i}" for i, (name, _) in enumerate(REFUSED)]
)
def test_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        expressive_attention(**{"query": _Q, "key": _K, "value": _V, **options})


def test_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="window_size"):
        expressive_attention(_Q, _K, _V, window_size=3)  # type: ignore[call-arg]


def test_key_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="key_bias"):
        attend(_Q, _K, _V, response=Response("hill"), key_bias=torch.zeros(2, 4, 7))
    for bad in ({"kind": "relu"}, {"kind": "square", "epsilon": -1.0}):
        with pytest.raises(ValueError, match=r"kind|epsilon"):
            Response(**bad)  # type: ignore[arg-type]


def test_named_implementation_runs_or_raises() -> None:
    """Nothing falls back: float64 is not covered by Triton, weights are not held by blockwise."""
    with pytest.raises(NotImplementedError, match="triton"):
        expressive_attention(_Q.double(), _K.double(), _V.double(), impl="triton")
    with pytest.raises(NotImplementedError, match="blockwise"):
        attend(_Q, _K, _V, response=Response("hill"), impl="blockwise", return_weights=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_named_implementation_is_the_one_that_runs(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    spied = {"reference": functional.reference.attention, "blockwise": blockwise.forward}
    for name, (module, attribute) in {
        "reference": (functional.reference, "attention"),
        "blockwise": (blockwise, "forward"),
    }.items():

        def spy(problem: Any, name: str = name) -> Any:
            ran.append(name)
            return spied[name](problem)

        monkeypatch.setattr(module, attribute, spy)
    expressive_attention(*operands(SIZE), impl=impl)  # type: ignore[arg-type]
    assert ran == [impl]


def test_weights() -> None:
    """The returned weights are the normalised ones: they sum to one and give the output."""
    tensors = operands(SIZE)
    out, weights = attend(*tensors, response=Response("hill"), is_causal=True, return_weights=True)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights @ tensors[2].repeat_interleave(2, dim=1), out)


# ---- compilation ----------------------------------------------------------------------------------


def _operator_arguments(options: dict[str, Any]) -> tuple[Any, ...]:
    """What `library.attention` hands to its operator."""
    recorded = []

    class Stop(Exception):
        pass

    def record(*arguments: Any) -> None:
        recorded.append(arguments)
        raise Stop

    forward = library._forward
    library._forward = record  # type: ignore[assignment]
    try:
        ours("blockwise")(*operands((2, 4, 2, 5, 7, 3, 4), torch.float32), **options)
    except Stop:
        pass
    finally:
        library._forward = forward
    return tuple(recorded[0])


def _opcheck_options(name: str) -> dict[str, Any]:
    permuted = torch.randn(7, 5, 4, 2).permute(3, 2, 1, 0)
    bounds = torch.tensor([[1, 2, 3, 4, 7]], dtype=torch.int32)
    return {
        "plain": {"is_causal": True, "sliding_window": 3},
        "scale and sinks": {"scale": torch.rand(4), "sinks": torch.randn(4), "softcap": 2.0},
        "permuted bias": {"bias": permuted.requires_grad_()},
        "expanded bias": {"bias": torch.randn(1, 4, 1, 7).expand(2, 4, 5, 7).requires_grad_()},
        "half bias": {"bias": torch.randn(2, 1, 5, 1).half().requires_grad_()},
        "key bias": {
            "key_bias": torch.randn(2, 7, 2).transpose(1, 2).requires_grad_(),
            "response": Response("square", epsilon=1e-5),
        },
        "ranges": {"attention_mask": KeyRanges(bounds - 1, bounds, torch.rand(2, 7) < 0.7)},
        "mask and dropout": {"attention_mask": torch.rand(2, 1, 5, 7) < 0.7, "dropout": 0.2},
    }[name]


OPCHECKED = (
    "plain",
    "scale and sinks",
    "permuted bias",
    "expanded bias",
    "half bias",
    "key bias",
    "ranges",
    "mask and dropout",
)


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    """Schema, fake implementation and autograd of the two operators agree with what runs."""
    arguments = _operator_arguments(_opcheck_options(name))
    operators = torch.ops.hf_expressive
    torch.library.opcheck(operators.attention_forward.default, arguments)
    out, log_normalizer = library._forward(*arguments)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    bias_wanted = [isinstance(a, Tensor) and a.requires_grad for a in arguments[4:6]]
    backward = (torch.randn_like(out), out.detach(), log_normalizer, *detached, *bias_wanted)
    results = library._backward(*backward)
    assert all(rows.transpose(1, 2).is_contiguous() for rows in results[:3])
    assert all(result.is_contiguous() for result in results[3:])
    torch.library.opcheck(
        operators.attention_backward.default,
        backward,
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_rows_lie_as_those_of_the_operands(impl: str, queries: int) -> None:
    """What models transpose back, the output and the gradients of their views, is not copied for it."""

    def view(length: int, heads: int, size: int) -> Tensor:
        return torch.randn(2, length, heads, size).transpose(1, 2).requires_grad_()

    query, key, value = view(queries, 4, 16), view(41, 2, 16), view(41, 2, 24)
    out = ours(impl)(query, key, value, is_causal=True)
    gradients = torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
    for rows, like in zip((out, *gradients), (query, query, key, value), strict=True):
        assert rows.transpose(1, 2).is_contiguous(), rows.stride()
        assert rows.shape[:3] == like.shape[:3]
    assert not out._is_view()
    value = value.contiguous()
    out = ours(impl)(query.contiguous(), key, value)
    assert out.is_contiguous()
    assert torch.autograd.grad(out.sum(), value)[0].is_contiguous()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    """One graph, forward and backward, on the transposed views that models hand over."""

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return expressive_attention(
            query, key, value, bias=bias, scale=scale, is_causal=True, sliding_window=4
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for queries in (5, 6) if dynamic else (5,):
        tensors = operands((2, 4, 2, queries, 7, 3, 4), torch.float32)
        options = {
            "bias": torch.randn(7, queries, 4, 1).permute(3, 2, 1, 0).requires_grad_(),
            "scale": torch.rand(4).requires_grad_(),
        }
        actual = value_and_gradients(compiled, tensors, options)
        expected = value_and_gradients(function, tensors, options)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_an_operator_may_be_defined_anew() -> None:
    """As a second import of the package does."""

    def times(factor: float) -> Any:
        def compute(x: Tensor) -> Tensor:
            return x * factor

        def fake(x: Tensor) -> Tensor:
            return torch.empty_like(x)

        return operator("times", compute, fake)

    one = torch.ones(1)
    for factor in (2.0, 3.0):
        defined = times(factor)
        torch.testing.assert_close(defined(one), factor * one)
        assert defined(one.to("meta")).is_meta


def test_operators_make_the_device_of_their_tensors_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here a device is the tensor that stands for it; Triton launches on the current one."""
    current: list[Tensor] = []
    found = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def compute(x: Tensor, y: Tensor) -> Tensor:
        found.append(bool((current[-1] == x).all()))
        return x + y

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    defined = operator("plus", compute, lambda x, y: torch.empty_like(x))
    defined(torch.ones(1), torch.zeros(1))
    assert found == [True]
    assert not current


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_compile_leaves_the_inside_of_operators_alone(mode: Any) -> None:
    """Also where they are called from a frame that could not be compiled."""
    graphs, given = [], operands(SIZE)

    def operator() -> Tensor:
        with contextlib.suppress(ValueError):
            torch._dynamo.graph_break()  # in a block of its own nothing after it is compiled
            return library._forward(
                *given, *([None] * 9), "hill", 1.0, 0.0, 0.25, True, -1, 0.0, 0.0, "blockwise"
            )[0]
        raise AssertionError

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with mode():
        found = torch.compile(operator, backend=backend)()
        torch.testing.assert_close(found, operator())
    calls = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    whole = torch.ops.hf_expressive.attention_forward.default
    assert {node.target for node in calls} <= {whole, getitem}


class Seen(TorchDispatchMode):
    """The names of what passes through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor of another class."""


def test_of_several_outputs_the_first_is_differentiable() -> None:
    """The log normaliser has no gradient, and autograd knows, with the dispatcher or without."""
    given = [tensor.requires_grad_() for tensor in operands(SIZE, torch.float32)]
    arguments = (*given, *([None] * 9), "hill", 1.0, 0.0, 0.25, True, -1, 0.0, 0.0, "blockwise")
    whole = torch.ops.hf_expressive.attention_forward.default
    for function in (library._forward, whole):
        out, log_normalizer = function(*arguments)
        assert out.requires_grad
        assert not log_normalizer.requires_grad


def test_who_looks_on_sees_the_operator() -> None:
    """Modes, tensors of other classes, transforms and tracers get it from the dispatcher."""
    tensors = operands(SIZE, torch.float32)
    arguments = (*tensors, *([None] * 9), "hill", 1.0, 0.0, 0.25, True, -1, 0.0, 0.0, "blockwise")
    expected = library._forward(*arguments)[0]
    name = "hf_expressive.attention_forward.default"
    with Seen() as seen:
        torch.testing.assert_close(library._forward(*arguments)[0], expected)
    assert name in seen.names
    assert _is_unobserved(tensors)
    assert not _is_unobserved([tensors[0].as_subclass(Subclass), *tensors[1:]])
    assert not torch.func.vmap(lambda t: t * _is_unobserved([t]))(tensors[0] + 1).any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(
            lambda *t: library._forward(*t, *arguments[3:])[0], tensors, check_trace=False
        )
    assert "attention_forward" in str(traced.graph)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(library._forward(*arguments)[0], FakeTensor)


# ---- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_TILE", 32)
    monkeypatch.setattr(blockwise, "_BLOCK_SCORES", 1024)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("options", ["plain", "ranges", "bias", "dropout"])
def test_memory_is_linear(direction: str, options: str, small_tiles: None) -> None:
    """The largest tensor that either pass makes grows like the length, never like its square."""
    largest = []
    for length in (256, 512):
        query, key, value = (t.detach() for t in operands((1, 2, 1, length, length, 2, 2)))
        extra: dict[str, Any] = {
            "plain": {"is_causal": True},
            "ranges": {
                "attention_mask": KeyRanges(
                    torch.zeros(1, length, dtype=torch.int32),
                    torch.arange(1, length + 1, dtype=torch.int32)[None],
                    torch.arange(length)[None] > 50,
                )
            },
            "bias": {"bias": torch.randn(1, 2, 1, length, dtype=torch.float64)},
            "dropout": {"dropout": 0.1},
        }[options]
        defaults = dict.fromkeys(
            ("scale", "key_bias", "attention_mask", "bias", "sliding_window", "softcap", "sinks")
        )
        arguments = {**defaults, "is_causal": False, "dropout": 0.0, **extra}
        problem = functional._problem(query, key, value, response=Response("hill"), **arguments)
        out, log_normalizer = blockwise.forward(problem)
        with Allocations() as watch:
            if direction == "forward":
                blockwise.forward(problem)
            else:
                need = {"need_key_bias": False, "need_bias": options == "bias"}
                blockwise.backward(problem, out, log_normalizer, out, **need)
        largest.append(watch.largest_bytes)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 8 * 512 * 512 / 16


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_autocast_rounds_the_operands_and_nothing_else(impl: Any) -> None:
    """As with stock attention, operands of mixed dtypes become bfloat16; the rest stays float32."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 33, 16).unbind()
    rounded = [tensor.bfloat16() for tensor in (query, key, value)]
    expected = expressive_attention(*rounded, scale=1.0, is_causal=True, impl=impl)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key)]
    with torch.autocast("cpu", torch.bfloat16):
        out = expressive_attention(*leaves, value.bfloat16(), scale=1.0, is_causal=True, impl=impl)
        out.float().square().sum().backward()
    assert torch.equal(out, expected)
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)
