# ruff: noqa: E501 - the tables of cases have one line a case
"""The Triton kernels against the float64 reference: forward, backward and decoding.

Without a GPU they run in Triton's interpreter, on sizes that still make several tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kernel_device import DEVICE, needs_gpu
from tolerances import assert_within_budget, largest_error, plain_attention
from torch import Tensor

from hf_expressive.attention.key_memory import KeyMemory
from hf_expressive.ops import expressive_attention, reference, triton
from hf_expressive.ops.dropout import keep_mask
from hf_expressive.ops.layout import in_order_of
from hf_expressive.ops.problem import HIDDEN, AttentionProblem, KeyRanges
from hf_expressive.ops.response import Response
from hf_expressive.ops.triton import decode
from hf_expressive.ops.triton.features import fused_features
from hf_expressive.ops.triton.magnitude import fused_magnitude

pytestmark = pytest.mark.usefixtures("poisoned")

SQUARE = Response("square", epsilon=1e-5)
EXP = Response("exp")


@dataclass(frozen=True)
class Case:
    """One problem: B, H, K, Q, N, D, E and what differs from a bare product."""

    name: str
    sizes: tuple[int, int, int, int, int, int, int] = (1, 2, 1, 37, 45, 24, 40)
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def problem(self) -> AttentionProblem:
        """Random tensors of this case; options that are functions get them to build on."""
        batch, heads, key_heads, queries, keys, size, value_size = self.sizes
        torch.manual_seed(sum(self.sizes))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE)

        tensors = {
            "query": self.magnitude * draw(batch, heads, queries, size),
            "key": self.magnitude * draw(batch, key_heads, keys, size),
            "value": draw(batch, key_heads, keys, value_size),
        }
        options = {"response": Response("hill"), "scale": size**-0.5} | self.options
        for name, option in options.items():
            options[name] = (
                option(draw) if isinstance(option, Callable) and name != "response" else option
            )  # type: ignore[arg-type]
        return AttentionProblem(
            **{name: tensor.to(self.dtype) for name, tensor in tensors.items()}, **options
        )


def differentiable(problem: AttentionProblem, dtype: torch.dtype) -> AttentionProblem:
    """The same problem in `dtype`, its tensors leaves that want gradients."""
    changes = {}
    for name in ("query", "key", "value", "gain", "key_bias", "bias", "sinks"):
        tensor = getattr(problem, name)
        if tensor is not None:
            wide = (
                dtype
                if name in ("query", "key", "value") or dtype == torch.float64
                else tensor.dtype
            )
            changes[name] = tensor.detach().to(wide).requires_grad_()
    return dataclasses.replace(problem, **changes)


def plain(problem: AttentionProblem) -> Tensor:
    """The plain implementation of `tolerances` on a problem."""
    keep = None
    if problem.dropout > 0.0:
        assert problem.seed is not None
        batch, heads, queries, keys = *problem.query.shape[:3], problem.key.shape[2]
        head = torch.arange(batch * heads, device=DEVICE).view(batch, heads, 1, 1)
        row = torch.arange(queries, device=DEVICE)[:, None]
        column = torch.arange(keys, device=DEVICE)
        keep = keep_mask(problem.seed, head, row, column, problem.dropout)
    return plain_attention(
        problem.query,
        problem.key,
        problem.value,
        scale=problem.scale if problem.gain is None else problem.scale * problem.gain,
        kind=problem.response.kind,
        power=problem.response.power,
        epsilon=problem.response.epsilon,
        visible=reference.visible_keys(problem),
        bias=problem.bias,
        key_bias=problem.key_bias,
        softcap=problem.softcap,
        sinks=None if problem.sinks is None else problem.sinks[..., None],
        keep=keep,
        dropout=problem.dropout,
    )


def check(problem: AttentionProblem, *, gradients: bool = True) -> None:
    """Output, log normaliser and every gradient of the kernels within the budget."""
    assert triton.unsupported(problem) is None
    exact = differentiable(problem, torch.float64)
    expected, expected_log, _ = reference.attention(exact)
    rough = differentiable(problem, problem.query.dtype)
    rough_out = plain(rough)
    out, log_normalizer = triton.forward(problem)
    assert in_order_of(problem.query, out) is out
    assert_within_budget(out, expected.detach(), rough_out.detach(), "out")
    expected_log = expected_log.detach()
    seen = expected_log.isfinite()
    assert torch.equal(log_normalizer.isfinite(), seen)
    assert bool((log_normalizer[~seen] == -torch.inf).all())
    if bool(seen.any()):
        limit = 1e-4 if problem.query.dtype == torch.float32 else 2e-2
        assert largest_error(log_normalizer[seen], expected_log[seen]) < limit
    if not gradients:
        return
    grad_out = torch.randn_like(out)
    expected.backward(grad_out.double())
    rough_out.backward(grad_out)
    found = triton.backward(
        problem,
        out,
        log_normalizer,
        grad_out,
        need_key_bias=problem.key_bias is not None,
        need_bias=problem.bias is not None,
    )
    for name, gradient in zip(("query", "key", "value", "key_bias", "bias"), found, strict=True):
        if getattr(problem, name) is None:
            assert gradient is None
            continue
        assert gradient is not None
        wanted, around = getattr(exact, name).grad, getattr(rough, name).grad
        unit = max(1.0, float(wanted.abs().max()))
        if problem.query.dtype == torch.float32 and bool(seen.any()):
            # The normaliser travels as a float32 logarithm, whose rounding scales whole rows.
            unit *= max(1.0, float(expected_log[seen].abs().max()))
        assert_within_budget(gradient / unit, wanted / unit, around / unit, f"gradient of {name}")


def packed(lengths: list[int], *, causal: bool) -> Callable[..., KeyRanges]:
    """Ranges of several sequences in one row; queries and keys are the same positions."""
    ends = torch.tensor(lengths).cumsum(0)
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    start, end = (ends - torch.tensor(lengths))[which], ends[which]
    if causal:
        end = torch.arange(len(which)) + 1
    return lambda draw: KeyRanges(start[None].int().to(DEVICE), end[None].int().to(DEVICE), None)


def padded(
    start: list[int], end: list[int], queries: int, keys: Tensor | None = None
) -> Callable[..., KeyRanges]:
    """Per sequence the same keys for every query."""
    bounds = [
        torch.tensor(side).int()[:, None].repeat(1, queries).to(DEVICE) for side in (start, end)
    ]
    return lambda draw: KeyRanges(*bounds, keys=None if keys is None else keys.to(DEVICE))


def share(first: int, second: int, size: int) -> Callable[..., KeyRanges]:
    """Two runs of the queries of a longer causal sequence, as one of several processes has them."""
    end = torch.cat([torch.arange(start, start + size) + 1 for start in (first, second)])
    end = end[None].int().to(DEVICE)
    return lambda draw: KeyRanges(torch.zeros_like(end), end, None)


def seed(draw: Callable[..., Tensor]) -> Tensor:
    return torch.tensor([123456789], device=DEVICE)


HALF = torch.float16
WIDE_GROUP = (2, 4, 2, 37, 45, 24, 40)
DECODING = (2, 4, 2, 1, 150, 24, 40)
CAUSAL = {"is_causal": True}
EVERY_OTHER_KEY = (torch.arange(45) % 2 == 0)[None]
CASES = [
    Case("plain"),
    Case("grouped heads", WIDE_GROUP),
    Case("one key", (1, 2, 2, 37, 1, 16, 16)),
    Case("one query", (1, 2, 2, 1, 37, 16, 16)),
    Case("one query, one key", (2, 2, 1, 1, 1, 8, 8)),
    Case("whole tiles", (1, 1, 1, 64, 64, 32, 32), options=CAUSAL),
    Case("small heads", (1, 1, 1, 70, 33, 3, 5)),
    Case("causal", options=CAUSAL),
    Case("causal, more queries than keys", (1, 2, 1, 70, 40, 16, 16), options=CAUSAL),
    Case("causal, grouped", WIDE_GROUP, options=CAUSAL),
    Case("causal window", (1, 2, 1, 70, 80, 16, 16), options=CAUSAL | {"sliding_window": 9}),
    Case("window", (1, 2, 1, 70, 80, 16, 16), options={"sliding_window": 9}),
    Case("scale of the paper", options={"scale": 1.0}),
    Case("tiny scale", options={"scale": 1e-5}),
    Case("learned scale", WIDE_GROUP, options={"gain": lambda draw: draw(4).exp()}),
    Case("learned scale, power 2", WIDE_GROUP, options={"gain": lambda draw: draw(4).exp(), "response": Response("hill", power=2.0)}),
    Case("power 2", options=CAUSAL | {"response": Response("hill", power=2.0)}),
    Case("power 3", options={"response": Response("hill", power=3.0)}),
    Case("power 4", options={"response": Response("hill", power=4.0)}),
    Case("power 1.5", options={"response": Response("hill", power=1.5)}),
    Case("square", options={"response": SQUARE}),
    Case("square, key bias", WIDE_GROUP, options=CAUSAL | {"response": SQUARE, "key_bias": lambda draw: 5 * draw(2, 2, 45)}),
    Case("square, key bias, keys first", WIDE_GROUP, options={"response": SQUARE, "key_bias": lambda draw: 5 * draw(2, 45, 2).mT}),
    Case("steep key bias", (1, 1, 1, 70, 70, 16, 16), options=CAUSAL | {"response": SQUARE, "key_bias": lambda draw: torch.linspace(0, 400, 70, device=DEVICE)[None, None]}),
    Case("key bias steep in one head", (1, 2, 2, 70, 70, 16, 16), options=CAUSAL | {"response": SQUARE, "key_bias": lambda draw: torch.linspace(0, 1, 70, device=DEVICE) * torch.tensor([[[400.0], [4.0]]], device=DEVICE)}),
    Case("steep key bias, sinks, window", (1, 2, 1, 70, 70, 16, 16), options=CAUSAL | {"sliding_window": 20, "response": SQUARE, "key_bias": lambda draw: torch.linspace(0, 400, 70, device=DEVICE)[None, None], "sinks": lambda draw: draw(1, 2, 1)}),
    Case("key bias, dropout, hidden keys", WIDE_GROUP, options={"key_bias": lambda draw: draw(2, 2, 45), "dropout": 0.3, "seed": seed, "ranges": padded([0, 3], [45, 40], 37, EVERY_OTHER_KEY)}),
    Case("softmax", WIDE_GROUP, options=CAUSAL | {"response": EXP}),
    Case("softmax, key bias, sinks", options={"response": EXP, "key_bias": lambda draw: draw(1, 1, 45), "sinks": lambda draw: draw(1, 2, 1)}),
    Case("softcap", options={"softcap": 1.5}),
    Case("softmax, softcap", options={"softcap": 1.5, "response": EXP}),
    Case("sinks", options=CAUSAL | {"sinks": lambda draw: draw(1, 2, 1)}),
    Case("sinks of each row", options={"sinks": lambda draw: draw(1, 2, 37)}),
    Case("bias", WIDE_GROUP, options={"bias": lambda draw: draw(2, 4, 37, 45)}),
    Case("bias shared by a batch", WIDE_GROUP, options={"bias": lambda draw: draw(1, 4, 37, 45)}),
    Case("bias shared by heads", WIDE_GROUP, options={"bias": lambda draw: draw(2, 1, 37, 45)}),
    Case("bias shared by queries", WIDE_GROUP, options=CAUSAL | {"bias": lambda draw: draw(2, 4, 1, 45)}),
    Case("bias shared by keys", options={"bias": lambda draw: draw(1, 2, 37, 1), "sinks": lambda draw: draw(1, 1, 1)}),
    Case("bias that hides", options={"bias": lambda draw: draw(1, 1, 37, 45).masked_fill(draw(1, 1, 37, 45) > 0, HIDDEN)}),
    Case("bias of −inf", options={"bias": lambda draw: draw(1, 1, 37, 45).masked_fill(draw(1, 1, 37, 45) > 0.5, -torch.inf)}),
    Case("mask", WIDE_GROUP, options={"mask": lambda draw: draw(2, 1, 37, 45) > 0.3}),
    Case("empty rows", options={"mask": lambda draw: (draw(1, 1, 37, 45) > 0) & (draw(1, 1, 37, 1) > 0)}),
    Case("all hidden", options={"mask": lambda draw: draw(1, 1, 37, 45) > 1e9, "response": SQUARE}),
    Case("left padding", WIDE_GROUP, options=CAUSAL | {"ranges": padded([0, 30], [45, 45], 37)}),
    Case("right padding", WIDE_GROUP, options={"ranges": padded([0, 0], [45, 7], 37)}),
    Case("hidden keys", options={"ranges": padded([0], [45], 37, EVERY_OTHER_KEY)}),
    Case("left padding as hidden keys", (2, 4, 2, 80, 80, 16, 16), options=CAUSAL | {"ranges": padded([0, 0], [80, 80], 80, torch.arange(80) >= torch.tensor([[0], [45]]))}),
    Case("one hole", (2, 2, 1, 70, 130, 16, 16), options={"ranges": padded([5], [130], 70, (torch.arange(130) < torch.tensor([[128], [100]])) & (torch.arange(130) != 70))}),
    Case("no key at all", (2, 2, 1, 70, 70, 16, 16), options=CAUSAL | {"ranges": padded([0], [70], 70, torch.arange(70) >= torch.tensor([[0], [70]]))}),
    Case("empty sequence", WIDE_GROUP, options={"ranges": padded([0, 9], [45, 9], 37), "response": EXP}),
    Case("packed", (1, 2, 1, 80, 80, 16, 16), options={"ranges": packed([3, 40, 1, 36], causal=False)}),
    Case("packed, causal", (1, 2, 1, 80, 80, 16, 16), options={"ranges": packed([3, 40, 1, 36], causal=True)}),
    Case("a share of the queries", (1, 4, 2, 40, 160, 16, 16), options={"ranges": share(20, 120, 20)}),
    Case("dropout", WIDE_GROUP, options={"dropout": 0.3, "seed": seed}),
    Case("dropout, softmax", options=CAUSAL | {"dropout": 0.3, "seed": seed, "response": EXP}),
    Case("float16", dtype=HALF, options=CAUSAL),
    Case("float16, large scores", dtype=HALF, magnitude=300.0, options={"scale": 1.0}),
    Case("float16, small scores", dtype=HALF, magnitude=0.02, options=CAUSAL),
    Case("float16, power 4, large scores", dtype=HALF, magnitude=300.0, options={"scale": 1.0, "response": Response("hill", power=4.0)}),
    Case("float16, square", dtype=HALF, magnitude=4.0, options={"response": SQUARE, "scale": 1.0}),
    Case("float16, softmax", dtype=HALF, options={"response": EXP}),
    Case("decoding", DECODING),
    Case("decoding, unsplit", (3, 4, 1, 1, 150, 24, 40)),
    Case("decoding, unsplit, window, sinks", (1, 12, 3, 2, 150, 24, 40), options=CAUSAL | {"sliding_window": 40, "sinks": lambda draw: draw(1, 12, 1)}),
    Case("decoding, unsplit, rows that see nothing", (3, 2, 1, 1, 70, 16, 16), options={"ranges": padded([0, 9, 70], [70, 9, 70], 1), "response": SQUARE}),
    Case("decoding, window, sinks", (1, 4, 2, 3, 150, 24, 40), options=CAUSAL | {"sliding_window": 40, "sinks": lambda draw: draw(1, 4, 1)}),
    Case("decoding, key bias", DECODING, options={"response": SQUARE, "key_bias": lambda draw: 5 * draw(2, 2, 150)}),
    Case("decoding, softmax", DECODING, options={"response": EXP}),
    Case("decoding, bias, dropout", DECODING, options={"bias": lambda draw: draw(1, 4, 1, 150), "dropout": 0.3, "seed": seed}),
    Case("decoding, learned scale", DECODING, options={"gain": lambda draw: draw(4).exp()}),
    Case("decoding, static cache", DECODING, options={"ranges": padded([0, 3], [20, 70], 1)}),
    Case("decoding, nothing visible", DECODING, options={"ranges": padded([0, 9], [20, 9], 1)}),
    Case("decoding, float16", DECODING, dtype=HALF),
]  # fmt: skip


def named(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.mark.parametrize("case", named(CASES))
def test_agrees_with_the_reference(case: Case) -> None:
    check(case.problem())


LARGE = [
    Case(f"{name}, {dtype}".removeprefix("torch."), sizes, dtype, options=options)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for name, sizes, options in (
        ("64", (2, 4, 2, 517, 517, 64, 64), CAUSAL),
        ("128", (2, 4, 1, 1000, 1100, 128, 128), CAUSAL),
        ("256", (1, 2, 1, 300, 300, 256, 256), CAUSAL),
        ("80 and 96", (1, 2, 1, 300, 400, 80, 96), {"sliding_window": 150}),
        ("square", (1, 2, 2, 600, 600, 128, 128), CAUSAL | {"response": SQUARE, "key_bias": lambda draw: draw(1, 2, 600)}),
        ("softmax", (1, 4, 2, 600, 600, 64, 64), CAUSAL | {"response": EXP}),
        ("power 2", (1, 4, 2, 600, 600, 128, 128), CAUSAL | {"response": Response("hill", power=2.0)}),
        ("power 4", (1, 4, 2, 300, 300, 128, 128), CAUSAL | {"response": Response("hill", power=4.0), "scale": 1.0}),
        ("learned", (1, 4, 2, 600, 600, 128, 128), CAUSAL | {"gain": lambda draw: draw(4).exp()}),
        ("bias", (1, 4, 2, 300, 300, 64, 64), {"bias": lambda draw: draw(1, 4, 300, 300)}),
        ("left padding", (2, 4, 2, 600, 600, 64, 64), CAUSAL | {"ranges": padded([0, 0], [600, 600], 600, torch.arange(600) >= torch.tensor([[0], [333]]))}),
        ("steep key bias", (1, 4, 2, 600, 600, 128, 128), CAUSAL | {"response": SQUARE, "key_bias": lambda draw: torch.linspace(0, 1, 600, device=DEVICE) * torch.tensor([[[400.0], [4.0]]], device=DEVICE)}),
        ("packed", (1, 4, 2, 600, 600, 64, 64), {"ranges": packed([3, 300, 1, 296], causal=True)}),
        ("a share of the queries", (1, 4, 2, 256, 1024, 128, 128), {"ranges": share(128, 768, 128)}),
        ("dropout", (1, 4, 2, 300, 300, 64, 64), CAUSAL | {"dropout": 0.2, "seed": seed}),
        ("decoding", (2, 8, 2, 1, 3000, 128, 128), {}),
        ("decoding for many", (16, 16, 8, 1, 700, 128, 128), {}),
        ("decoding for many, key bias", (32, 8, 4, 2, 300, 64, 64), CAUSAL | {"response": SQUARE, "key_bias": lambda draw: draw(32, 4, 300)}),
        ("decoding, key bias", (2, 8, 2, 2, 3000, 64, 64), CAUSAL | {"response": SQUARE, "key_bias": lambda draw: draw(2, 2, 3000)}),
    )
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("case", named(LARGE))
def test_agrees_with_the_reference_on_full_tiles(case: Case) -> None:
    check(case.problem())


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_bfloat16_scores_of_any_size_stay_finite(power: float) -> None:
    case = Case(
        "", dtype=torch.bfloat16, magnitude=1e5, options={"response": Response("hill", power=power)}
    )
    problem = case.problem()
    out, log_normalizer = triton.forward(problem)
    gradients = triton.backward(
        problem, out, log_normalizer, torch.ones_like(out), need_key_bias=False, need_bias=False
    )
    expected, _, _ = reference.attention(problem)
    assert largest_error(out, expected) < 0.02
    assert all(
        bool(gradient.isfinite().all()) for gradient in gradients[:3] if gradient is not None
    )


def test_strides_do_not_matter() -> None:
    problem = Case("", WIDE_GROUP, options=CAUSAL).problem()
    views = {
        "query": problem.query.transpose(1, 2).contiguous().transpose(1, 2),
        "key": problem.key.mT.contiguous().mT,
        "value": torch.cat((problem.value, problem.value), dim=-1)[..., :40],
    }
    assert not any(view.is_contiguous() for view in views.values())
    check(dataclasses.replace(problem, **views))


@pytest.mark.parametrize("response", [Response("hill"), SQUARE], ids=["hill", "square"])
def test_a_row_that_sees_one_key_leaves_its_score_alone(response: Response) -> None:
    """Its weight is 1 whatever the score: no rounding may come through, however steep the response."""
    options = CAUSAL | {"response": response, "scale": 1e-3}
    problem = Case("", (1, 2, 1, 70, 70, 16, 16), torch.bfloat16, options=options).problem()
    out, log_normalizer = triton.forward(problem)
    first_row_only = torch.zeros_like(out)
    first_row_only[:, :, 0] = torch.randn_like(out[:, :, 0])
    grad_query, grad_key, grad_value, _, _ = triton.backward(
        problem, out, log_normalizer, first_row_only, need_key_bias=False, need_bias=False
    )
    assert not grad_query.any()
    assert not grad_key.any()
    expected = first_row_only[:, :, 0].float().sum(dim=1)
    assert largest_error(grad_value[:, 0, 0], expected) < 0.05


def test_gradient_of_an_expanded_output() -> None:
    problem = Case("").problem()
    out, log_normalizer = triton.forward(problem)
    ones = torch.ones(1, 1, 1, 1, device=DEVICE).expand(out.shape)
    spread, dense = (
        triton.backward(problem, out, log_normalizer, grad, need_key_bias=False, need_bias=False)
        for grad in (ones, ones.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(spread[:3], dense[:3], strict=True))  # type: ignore[arg-type]


def test_two_runs_agree_to_the_last_bit() -> None:
    problem = Case(
        "", WIDE_GROUP, options=CAUSAL | {"bias": lambda draw: draw(1, 4, 1, 45)}
    ).problem()

    def run() -> list[Tensor]:
        out, log_normalizer = triton.forward(problem)
        gradients = triton.backward(
            problem, out, log_normalizer, torch.ones_like(out), need_key_bias=False, need_bias=True
        )
        return [out, log_normalizer, *(g for g in gradients if g is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_order_of_programs_changes_nothing(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles of one or two of the three key/value heads, the last one incomplete."""
    from hf_expressive.ops.triton import launch

    problem = Case("", (1, 6, 3, 70, 70, 16, 16), options=CAUSAL).problem()

    def run() -> list[Tensor]:
        out, log_normalizer = triton.forward(problem)
        gradients = triton.backward(
            problem, out, log_normalizer, torch.ones_like(out), need_key_bias=False, need_bias=False
        )
        return [out, log_normalizer, *(g for g in gradients if g is not None)]

    together = run()
    key_and_value = 2 * problem.key[0, 0].nbytes
    monkeypatch.setattr(launch, "_BUNDLE_BYTES", heads * key_and_value)
    assert launch.Call(problem).bundle(problem.key, problem.value) == 2 * heads
    assert all(torch.equal(a, b) for a, b in zip(together, run(), strict=True))


@pytest.mark.parametrize("fault", ["power", "window"])
def test_a_wrong_kernel_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_expressive.ops.triton import launch

    problem = Case("", options=CAUSAL | {"sliding_window": 9}).problem()
    call = launch.Call(problem)
    if fault == "power":
        wrong = dataclasses.replace(call.rule, plain=False, prescaled=False, power=2.0)
        monkeypatch.setattr(launch, "_rule_of", lambda problem, steady: wrong)
    else:
        monkeypatch.setattr(launch.Call, "terms", call.terms._replace(left=10))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check(problem)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"sizes": (1, 1, 1, 4, 4, 300, 16)}, "300"),
        ({"sizes": (1, 1, 1, 4, 0, 16, 16)}, "empty"),
    ],
)
def test_unsupported_says_why(change: dict[str, Any], reason: str) -> None:
    said = triton.unsupported(Case("", **change).problem())
    assert said is not None
    assert reason in said


@needs_gpu
def test_decoding_can_be_captured_in_a_graph() -> None:
    length = torch.full((1, 1), 100, dtype=torch.int32, device=DEVICE)
    ranges = KeyRanges(torch.zeros_like(length), length)
    problem = Case(
        "", (1, 8, 2, 1, 2000, 64, 64), torch.bfloat16, options={"ranges": ranges}
    ).problem()
    triton.forward(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = triton.forward(problem)
    for keys in (100, 1, 1999):
        length.fill_(keys)
        graph.replay()
        expected, _, _ = reference.attention(problem)
        assert largest_error(out, expected) < 0.02


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    query, key, value = (torch.randn(1, 2, 70, 64, device="cuda:1") for _ in range(3))
    found = expressive_attention(query, key, value, impl="triton")
    expected = expressive_attention(query, key, value, impl="reference")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    frequencies = torch.randn(2, 2, 64, 8, device="cuda:1")
    kept = KeyMemory().features(key, frequencies, 3.0, factor=0.5, magnitude_factor=0.5)
    made = fused_features(key, frequencies, 0.5), fused_magnitude(key, 3.0, 0.5)
    torch.testing.assert_close(kept, made)


@pytest.mark.parametrize(
    ("rows", "most", "splits"),
    # On 132 processors: one split a head where the heads fill them, else as many as nearly do.
    [(128, 64, 1), (8, 64, 16), (8, 4, 4), (100, 64, 5), (1, 1, 1), (1000, 64, 1)],
)
def test_decoding_takes_the_fewest_splits_that_keep_processors_busy(
    rows: int, most: int, splits: int
) -> None:
    assert decode.num_splits(rows, most, 132) == splits


def allowed_by_its_old_name(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed


def allowed_by_its_new_name(allowed: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"


@pytest.mark.parametrize("allow", [allowed_by_its_old_name, allowed_by_its_new_name])
def test_products_of_float32_follow_the_setting_of_pytorch(allow: Callable[[bool], None]) -> None:
    """Each of the two names of the setting; the old one cannot be asked once the new one was used.

    Calls repeated from memory ask, too.
    """
    from hf_expressive.ops.operator import _settings
    from hf_expressive.ops.triton import launch

    before = torch.backends.cuda.matmul.fp32_precision
    problem = Case("plain").problem()
    try:
        for allowed in (True, False, True):
            allow(allowed)
            rule = launch._rule_of(problem, steady=True)
            assert rule.precision == _settings() == ("tf32" if allowed else "ieee")
            if not allowed:
                exact = reference.attention(problem)[0]
                assert largest_error(triton.forward(problem)[0], exact) < 1e-5
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
