"""What is checked on each architecture: functions of its name that raise `AssertionError`."""

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_expressive import ImplicitKernelConfig

from . import dense
from .builder import Case, build
from .exceptions import (
    BLIND,
    BOOLEAN_MASK,
    CONVERSION_SEED,
    KEEP_EAGER,
    KERNEL_SEED,
    NO_PADDING,
    NO_SPECTRAL_KERNEL,
    REFUSED,
    SINGLE_PRECISION,
)
from .inputs import Padding

PACKAGE = "expressive"
KERNEL = "implicit_kernel"
# Options of a mechanism where they are not its defaults.
OPTIONS = {KERNEL: ImplicitKernelConfig(kernel="direct", num_features=4, norm_dropout=0.0)}
PADDINGS: tuple[Padding, ...] = ("none", "left", "right")
# Largest difference allowed between two float32 outputs, relative to the largest number in them.
TOLERANCE = 1e-4
# The same where a softmax model has merely been converted.
CONVERSION_TOLERANCE = 1e-5
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
    one: dict[str, Tensor],
    other: dict[str, Tensor],
    inputs: dict[str, Any],
    what: str,
    tolerance: float = TOLERANCE,
) -> None:
    assert one.keys() == other.keys(), (
        f"{what}: different outputs, {sorted(one.keys() ^ other.keys())}"
    )
    for name in other:
        difference = _difference(_valid(one[name], inputs), _valid(other[name], inputs))
        assert difference <= tolerance, f"{what}: {name} differs by {difference:.2g}"


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


def kernel_seed(name: str) -> int:
    """Seed of the checks of a learned kernel."""
    return KERNEL_SEED.get(name) or steady_seed(name)


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


def _gradients(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of a random linear form of all outputs, of the parameters that have any."""
    _convert(case, dtype)
    outputs = run(case, _in_dtype(case.inputs(), dtype))
    random = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=dtype)
    for value in outputs.values():
        if value.requires_grad:
            value = torch.nan_to_num(value, 0.0, 0.0, 0.0)
            loss = loss + (value * torch.randn(value.shape, generator=random)).mean()
    if not loss.requires_grad:
        raise NotApplicable("the outputs carry no gradient")
    loss.backward()
    parameters = case.model.named_parameters()
    return {key: p.grad for key, p in parameters if p.grad is not None and p.grad.numel()}


def _convert(case: Case, dtype: torch.dtype) -> None:
    # Grouped products of experts exist in half and single precision only.
    if dtype == torch.float64 and case.model.config._experts_implementation is not None:
        case.model.set_experts_implementation("eager")
    case.model.to(dtype=dtype)  # type: ignore[call-arg]


def _widest(name: str) -> torch.dtype:
    return torch.float32 if name.split("/")[0] in SINGLE_PRECISION else torch.float64


def _in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def gradients_are_dense(name: str) -> None:
    """Parameter gradients are finite and equal the witness's.

    In float64, where gradients that cancel (attention to a single key) are still far above rounding;
    in float32, with a budget for rounding, where a model itself computes in nothing wider.
    """
    pair = _pair(name, PACKAGE, witness_of(name, dense.EXPRESSIVE))
    dtype = _widest(name)
    one, other = (_gradients(case, dtype) for case in pair)
    assert one.keys() == other.keys(), (
        f"gradients reach other parameters: {sorted(one.keys() ^ other.keys())[:3]}"
    )
    assert one, "no parameter has a gradient"
    largest = max(float(gradient.abs().max()) for gradient in other.values())
    relative, floor = (1e-6, 1e-12) if dtype == torch.float64 else (5e-3, 5e-6)
    for key, gradient in other.items():
        assert bool(torch.isfinite(one[key]).all()), f"the gradient of {key} is not finite"
        difference = float((one[key] - gradient).abs().max())
        budget = relative * float(gradient.abs().max()) + floor * largest
        assert difference <= budget, (
            f"the gradient of {key} differs by {difference:.2g}, more than {budget:.2g}"
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
    inputs = _in_dtype(case.inputs(padding), case.model.dtype)
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


_WAYS: dict[str, dict[str, Any]] = {
    "uncached": {"use_cache": False},
    "cached": {"use_cache": True},
    "static": {"use_cache": True, "cache_implementation": "static"},
}


def _witness(name: str, mechanism: str, seed: int) -> Case:
    """The dense witness of a mechanism, for a learned kernel with the frequencies of the package's."""
    if mechanism != KERNEL:
        return build(name, witness_of(name, dense.EXPRESSIVE), seed)
    ours = build(name, KERNEL, seed, options=OPTIONS[KERNEL])
    _convert(ours, _widest(name))
    witness = Case(ours.name, ours.family, copy.deepcopy(ours.model))
    dense.switch(witness.model, KERNEL, witness_of(name, dense.KERNEL))
    return witness


@cache
def _agreement(name: str, one: str, other: str, mechanism: str) -> tuple[int, tuple[Padding, ...]]:
    """A seed and the paddings at which two ways to generate agree for the witness.

    They need not: a model may not support one of the ways, rounding may flip its choice of experts
    or keys, and a generated token may be one that it counts as padding or as an image; another seed
    avoids that.
    """
    reasons = []
    for seed in SEEDS:
        witness = _witness(name, mechanism, seed)
        if not witness.model.can_generate():
            raise NotApplicable("does not generate")
        paddings: list[Padding] = (
            ["none", "left"] if witness.can_pad(witness.inputs("left")) else ["none"]
        )
        for padding in list(paddings):
            try:
                reason = _agree(witness, padding, _WAYS[one], _WAYS[other])
            except Exception as error:  # whatever a model raises that cannot generate this way
                reason = f"{type(error).__name__}: {error}"
            if reason:
                reasons.append(reason)
                paddings.remove(padding)
        if "none" in paddings:
            return seed, tuple(paddings)
    raise NotApplicable(f"the witness fails it too: {reasons[0]}")


def _assert_generates(name: str, one: str, other: str, mechanism: str = PACKAGE) -> None:
    """Two ways to generate agree, wherever they agree for the witness."""
    seed, paddings = _agreement(name, one, other, mechanism)
    ours = build(name, mechanism, seed, options=OPTIONS.get(mechanism))
    if mechanism == KERNEL:
        _convert(ours, _widest(name))
    for padding in paddings:
        reason = _agree(ours, padding, _WAYS[one], _WAYS[other])
        assert not reason, reason


def cached_is_uncached(name: str) -> None:
    """Greedy generation with and without a cache agrees."""
    _assert_generates(name, "uncached", "cached")


def static_is_dynamic(name: str) -> None:
    """Greedy generation with a static and with a dynamic cache agrees."""
    _assert_generates(name, "cached", "static")


def _reloaded(name: str, attn_implementation: str) -> tuple[Case, Case]:
    seed = KERNEL_SEED.get(name, 0) if attn_implementation == KERNEL else 0
    case = build(name, attn_implementation, seed, options=OPTIONS.get(attn_implementation))
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        again = type(case.model).from_pretrained(folder).eval()
    return case, Case(name, case.family, again)


@torch.no_grad()
def reloads(name: str) -> None:
    """A saved model loads back with its mechanism and gives the same outputs."""
    _assert_reloads(name, PACKAGE)


def _assert_reloads(name: str, mechanism: str) -> None:
    try:
        case, again = _reloaded(name, mechanism)
    except ImportError as error:  # a stand-in is not what the configuration class loads
        try:
            _reloaded(name, "eager")
        except ImportError as same:
            raise NotApplicable(f"eager attention fails as well: {same}") from same
        raise AssertionError(str(error)) from error
    inputs = case.inputs()
    assert_same(run(again, inputs), run(case, inputs), inputs, "after loading")


def _run_in_bfloat16(name: str, attn_implementation: str, padding: Padding) -> dict[str, Tensor]:
    case = build(name, attn_implementation)
    case.model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    return run(case, _in_dtype(case.inputs(padding), torch.bfloat16))


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


@torch.no_grad()
def rbf_is_softmax(name: str) -> None:
    """The RBF kernel with p = 2 reproduces the model's own softmax: converting loses nothing."""
    softmax = "sdpa" if name.split("/")[0] in BOOLEAN_MASK else "eager"
    own = build(name, softmax, CONVERSION_SEED.get(name, 0))
    rbf = ImplicitKernelConfig(kernel="rbf", p=2.0, norm_dropout=0.0)
    converted = build(name, KERNEL, options=rbf)
    converted.model.load_state_dict(own.model.state_dict())
    for padding, inputs in _paddings(own):
        if padding == "left":
            continue  # causal rows that see no key are zero by contract, and some models pool there
        one, other = run(converted, inputs), run(own, inputs)
        for key in BLIND.get(name, ()):
            del one[key], other[key]
        tolerance = CONVERSION_TOLERANCE
        assert_same(one, other, inputs, f"padding {padding}", tolerance)


@torch.no_grad()
def kernel_is_dense(name: str) -> None:
    """A learned spectral kernel equals the witness with the same frequencies."""
    ours = build(name, KERNEL, kernel_seed(name), options=OPTIONS[KERNEL])
    _convert(ours, _widest(name))
    witness = Case(ours.name, ours.family, copy.deepcopy(ours.model))
    dense.switch(witness.model, KERNEL, witness_of(name, dense.KERNEL))
    for padding, inputs in _paddings(ours):
        inputs = _in_dtype(inputs, _widest(name))
        assert_same(run(ours, inputs), run(witness, inputs), inputs, f"padding {padding}")


def kernel_learns(name: str) -> None:
    """Gradients of a learned spectral kernel are finite, and its own parameters get some."""
    case = build(name, KERNEL, kernel_seed(name), options=OPTIONS[KERNEL])
    gradients = _gradients(case, torch.float32)
    for key, gradient in gradients.items():
        assert bool(torch.isfinite(gradient).all()), f"the gradient of {key} is not finite"
    own = [gradient for key, gradient in gradients.items() if ".mechanism." in key]
    assert any(bool((gradient != 0).any()) for gradient in own), "the frequencies get no gradient"


def kernel_cached_is_uncached(name: str) -> None:
    """Greedy generation with a learned spectral kernel: with and without a cache it agrees."""
    _assert_generates(name, "uncached", "cached", KERNEL)


@torch.no_grad()
def kernel_reloads(name: str) -> None:
    """A saved model with a learned spectral kernel loads back with it."""
    _assert_reloads(name, KERNEL)


def refuses_kernel(name: str) -> None:
    """Where a spectral kernel has no meaning, or no size, it is refused with the reason."""
    try:
        case = build(name, KERNEL, options=OPTIONS[KERNEL])
        run(case, case.inputs())
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError("accepted")
    assert "kernel" in message, f"refused without naming the kernel: {message}"


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
    remedy = re.search(r"attn_implementation=(\{.*\})", message)
    assert remedy or name in REFUSED, f"refused without the remedy: {message}"
    if remedy is not None:
        build(name, json.loads(remedy.group(1)), whole=True)


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
    rbf_is_softmax,
)
# Checks of a learned spectral kernel.
OF_KERNEL = (kernel_is_dense, kernel_learns, kernel_cached_is_uncached, kernel_reloads)


def checks_of(name: str) -> list[Callable[[str], None]]:
    """The checks that an architecture has to pass."""
    if name in REFUSED:
        return [*OF_WITNESS, refuses]
    of_kernel = [refuses_kernel] if name in NO_SPECTRAL_KERNEL else OF_KERNEL
    return [*OF_WITNESS, *([refuses] if name in KEEP_EAGER else []), *OF_PACKAGE, *of_kernel]
