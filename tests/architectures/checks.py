"""What is checked on each architecture: functions of its name that raise `AssertionError`."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import dense
from .builder import Case, build
from .exceptions import BOOLEAN_MASK, KEEP_EAGER, NO_PADDING, REFUSED
from .inputs import Padding

PACKAGE = "expressive"
PADDINGS: tuple[Padding, ...] = ("none", "left", "right")
# Largest difference allowed between two float32 outputs, relative to the largest number in them.
TOLERANCE = 1e-4
# The same for parameter gradients, relative to the largest gradient of the parameter.
GRADIENT_TOLERANCE = 5e-3
# The response must change the outputs by this much, else a comparison of outputs says nothing about
# attention.
NOTICEABLE = 1e-3
# Numbers from here on stand for "never": some models write the dtype's minimum into logits.
EXTREME = 1e30
NEW_TOKENS = 4
SEEDS = (0, 1, 2, 3)
# Relative change of the weights that stands for rounding.
ROUNDING = 1e-5
# Rounding that changes outputs by more than this has flipped a choice.
JUMP = 1e-2


class NotApplicable(Exception):
    """The check has no meaning for this architecture; the message says why."""


def tensors(outputs: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a model's outputs, caches left out."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point() and outputs.numel():
            yield path, outputs
    elif isinstance(outputs, Mapping):
        for name, value in outputs.items():
            if "past_key_values" not in name and "attentions" not in name:
                yield from tensors(value, f"{path}.{name}")
    elif isinstance(outputs, (list, tuple)):
        for index, value in enumerate(outputs):
            yield from tensors(value, f"{path}[{index}]")


def run(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # some models draw noise in their forward pass
    # Sessions and caches among the inputs change in a forward pass; every run starts from the same
    # ones.
    outputs = dict(tensors(case.model(**copy.deepcopy(inputs))))
    assert outputs, "the model returned no floating-point tensor"
    return outputs


def _valid(value: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The part of an output that belongs to visible tokens."""
    mask = inputs.get("attention_mask")
    if mask is not None and value.shape[: mask.ndim] == mask.shape:
        return value[mask.bool()]
    return value


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest number; infinite if not finite in the same places."""
    usable = other.abs() < EXTREME
    if not bool(((one.abs() < EXTREME) == usable).all()):
        return float("inf")
    if not bool(usable.any()):
        return 0.0
    scale = float(other[usable].abs().max())
    difference = float((one - other)[usable].abs().max())
    return difference / scale if scale > 0.0 else difference


def assert_same(
    one: dict[str, Tensor], other: dict[str, Tensor], inputs: dict[str, Any], what: str
) -> None:
    assert one.keys() == other.keys(), (
        f"{what}: different outputs, {sorted(one.keys() ^ other.keys())}"
    )
    for name in other:
        difference = _difference(_valid(one[name], inputs), _valid(other[name], inputs))
        assert difference <= TOLERANCE, f"{what}: {name} differs by {difference:.2g}"


def witness_of(name: str, response: str) -> str:
    """The witness for an architecture: with boolean masks where additive ones do not work."""
    return response + dense.BOOLEAN if name.split("/")[0] in BOOLEAN_MASK else response


@cache
@torch.no_grad()
def steady_seed(name: str) -> int:
    """First seed at which rounding does not decide which keys or experts are chosen.

    Selections jump where scores tie, and indexers cut their scores off at zero, so they often do.
    """
    for seed in SEEDS:
        case = build(name, witness_of(name, dense.EXPRESSIVE), seed)
        inputs = dict(_paddings(case))
        before = {padding: run(case, inputs[padding]) for padding in inputs}
        if not any(_jumps(case, inputs, before, draw) for draw in range(3)):
            return seed
    raise AssertionError("rounding changes the outputs with every seed tried")


def _jumps(
    case: Case,
    inputs: dict[Padding, dict[str, Any]],
    before: dict[Padding, dict[str, Tensor]],
    draw: int,
) -> bool:
    """Whether a change of the weights as small as rounding makes the outputs jump."""
    random = torch.Generator().manual_seed(draw)
    for parameter in case.model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1 + ROUNDING * torch.randn(parameter.shape, generator=random))
    return any(
        _difference(_valid(value, inputs[padding]), _valid(before[padding][key], inputs[padding]))
        > JUMP
        for padding in inputs
        for key, value in run(case, inputs[padding]).items()
    )


def _pair(name: str, one: str, other: str) -> tuple[Case, Case]:
    """The same architecture with the same weights and two attention implementations."""
    seed = steady_seed(name)
    first, second = build(name, one, seed), build(name, other, seed)
    first.model.load_state_dict(second.model.state_dict())
    return first, second


def _paddings(case: Case) -> Iterator[tuple[Padding, dict[str, Any]]]:
    for padding in PADDINGS[:1] if case.name in NO_PADDING else PADDINGS:
        inputs = case.inputs(padding)
        if padding == "none" or case.can_pad(inputs):
            yield padding, inputs


@torch.no_grad()
def dense_is_eager(name: str) -> None:
    """The witness with g = exp reproduces the model's own eager attention."""
    own = "sdpa" if name.split("/")[0] in BOOLEAN_MASK else "eager"
    witness, eager = _pair(name, witness_of(name, dense.SOFTMAX), own)
    for padding, inputs in _paddings(eager):
        assert_same(run(witness, inputs), run(eager, inputs), inputs, f"padding {padding}")


@torch.no_grad()
def attention_matters(name: str) -> None:
    """Another response changes the outputs, so comparing outputs tests attention."""
    hill, softmax = _pair(name, witness_of(name, dense.EXPRESSIVE), witness_of(name, dense.SOFTMAX))
    inputs = softmax.inputs()
    one, other = run(hill, inputs), run(softmax, inputs)
    change = max(_difference(one[key], other[key]) for key in other)
    assert change > NOTICEABLE, f"the response changes the outputs by {change:.2g} only"


@torch.no_grad()
def package_is_dense(name: str) -> None:
    """The package's expressive attention equals the witness."""
    ours, witness = _pair(name, PACKAGE, witness_of(name, dense.EXPRESSIVE))
    for padding, inputs in _paddings(witness):
        assert_same(run(ours, inputs), run(witness, inputs), inputs, f"padding {padding}")


def gradients_are_dense(name: str) -> None:
    """Parameter gradients are finite and equal the witness's."""
    ours, witness = _pair(name, PACKAGE, witness_of(name, dense.EXPRESSIVE))
    inputs = witness.inputs()
    gradients = []
    for case in (ours, witness):
        random = torch.Generator().manual_seed(0)
        outputs = run(case, inputs)
        loss = torch.zeros(())
        for value in outputs.values():
            if value.requires_grad:
                value = torch.nan_to_num(value, 0.0, 0.0, 0.0)
                loss = loss + (value * torch.randn(value.shape, generator=random)).mean()
        if not loss.requires_grad:
            raise NotApplicable("the outputs carry no gradient")
        loss.backward()
        gradients.append(
            {key: p.grad for key, p in case.model.named_parameters() if p.grad is not None}
        )
    one, other = gradients
    assert one.keys() == other.keys(), (
        f"gradients reach other parameters: {sorted(one.keys() ^ other.keys())[:3]}"
    )
    assert one, "no parameter has a gradient"
    other = {key: gradient for key, gradient in other.items() if gradient.numel()}
    largest = max(float(gradient.abs().max()) for gradient in other.values())
    for key, gradient in other.items():
        assert bool(torch.isfinite(one[key]).all()), f"the gradient of {key} is not finite"
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        difference = float((one[key] - gradient).abs().max()) / scale
        assert difference <= GRADIENT_TOLERANCE, (
            f"the gradient of {key} differs by {difference:.2g}"
        )


@torch.no_grad()
def _generate(
    model: PreTrainedModel, inputs: dict[str, Any], **options: Any
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 1
    outputs = model.generate(  # type: ignore[operator]
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
        **options,
    )
    return outputs.sequences, torch.stack(outputs.logits, dim=1)


def _agree(case: Case, padding: Padding, reference: dict[str, Any], tried: dict[str, Any]) -> str:
    """Generate in two ways; returns how the results differ, or nothing."""
    inputs = case.inputs(padding)
    for name in ("use_cache", "decoder_input_ids"):
        inputs.pop(name, None)
    tokens, logits = _generate(case.model, inputs, **reference)
    other_tokens, other_logits = _generate(case.model, inputs, **tried)
    if not torch.equal(tokens, other_tokens):
        return f"other tokens, {padding} padding"
    difference = _difference(other_logits, logits)
    return (
        ""
        if difference <= TOLERANCE
        else f"the logits differ by {difference:.2g}, {padding} padding"
    )


def _assert_generates(name: str, reference: dict[str, Any], tried: dict[str, Any]) -> None:
    """Two ways to generate agree, wherever they agree for the witness.

    They need not: a model may not support one of the ways, and rounding may flip its choice of
    experts or keys, which another seed avoids.
    """
    reasons = []
    for seed in SEEDS:
        witness = build(name, witness_of(name, dense.EXPRESSIVE), seed)
        inputs = witness.inputs()
        if not witness.model.can_generate() or "input_ids" not in inputs:
            raise NotApplicable("does not generate from tokens")
        paddings: list[Padding] = (
            ["none", "left"] if witness.can_pad(witness.inputs("left")) else ["none"]
        )
        for padding in list(paddings):
            try:
                reason = _agree(witness, padding, reference, tried)
            except Exception as error:  # whatever a model raises that cannot generate this way
                reason = f"{type(error).__name__}: {error}"
            if reason:
                reasons.append(reason)
                paddings.remove(padding)
        if "none" in paddings:
            break
    else:
        raise NotApplicable(f"the witness fails it too: {reasons[0]}")
    ours = build(name, PACKAGE, seed)
    for padding in paddings:
        reason = _agree(ours, padding, reference, tried)
        assert not reason, reason


def cached_is_uncached(name: str) -> None:
    """Greedy generation with and without a cache agrees."""
    _assert_generates(name, {"use_cache": False}, {"use_cache": True})


def static_is_dynamic(name: str) -> None:
    """Greedy generation with a static and with a dynamic cache agrees."""
    _assert_generates(
        name, {"use_cache": True}, {"use_cache": True, "cache_implementation": "static"}
    )


@torch.no_grad()
def reloads(name: str) -> None:
    """A saved model loads back with its mechanism and gives the same outputs."""
    case = build(name, PACKAGE)
    inputs = case.inputs()
    before = run(case, inputs)
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        again = type(case.model).from_pretrained(folder).eval()
    assert_same(run(Case(name, case.family, again), inputs), before, inputs, "after loading")


def _run_in_bfloat16(name: str, attn_implementation: str, padding: Padding) -> dict[str, Tensor]:
    case = build(name, attn_implementation)
    inputs = case.inputs(padding)
    case.model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    if "inference_session" in inputs:  # made by the model, in its dtype
        inputs = case.inputs(padding)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[key] = value.bfloat16()
    return run(case, inputs)


@torch.no_grad()
def bfloat16_is_finite(name: str) -> None:
    """In bfloat16 the outputs are finite where the float32 ones are."""
    case = build(name, PACKAGE)
    for padding, inputs in _paddings(case):
        expected = run(case, inputs)
        try:
            outputs = _run_in_bfloat16(name, PACKAGE, padding)
        except RuntimeError as error:
            try:
                _run_in_bfloat16(name, "eager", padding)
            except RuntimeError as same:
                raise NotApplicable(f"eager attention fails as well: {same}") from same
            raise AssertionError(f"padding {padding}: {error}") from error
        for key, value in expected.items():
            finite = torch.isfinite(_valid(value, inputs))
            actual = torch.isfinite(_valid(outputs[key], inputs))
            if actual.shape != finite.shape:  # as many keypoints as scores pass a threshold
                finite = torch.ones_like(actual)
            assert bool((actual | ~finite).all()), f"padding {padding}: {key} is not finite"


def refuses(name: str) -> None:
    """An architecture with a part that computes its own softmax is refused, with the reason."""
    try:
        build(name, PACKAGE, whole=True)
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError("accepted, though a part of it computes its own softmax")
    assert f'"{PACKAGE}"' in message, f"refused without naming the mechanism: {message}"
    assert "registry" in message, f"refused without the reason: {message}"


# Checks of the witness alone, which need no package.
OF_WITNESS = (dense_is_eager, attention_matters)
# Checks of an architecture that the package runs.
OF_PACKAGE = (
    package_is_dense,
    gradients_are_dense,
    cached_is_uncached,
    static_is_dynamic,
    reloads,
    bfloat16_is_finite,
)


def checks_of(name: str) -> list[Callable[[str], None]]:
    """The checks that an architecture has to pass."""
    if name in REFUSED:
        return [*OF_WITNESS, refuses]
    return [*OF_WITNESS, *([refuses] if name in KEEP_EAGER else []), *OF_PACKAGE]
