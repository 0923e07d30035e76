"""Proof on the user's own model that a mechanism does what it should, in a few forward passes.

Every check runs the model itself on small random input and compares two results that must agree.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention.base import AttentionCall, Mechanism
from .discovery import AttentionModule, attention_modules
from .patcher import runs
from .registry import CHILD, MECHANISMS

_LENGTH = 12
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class VerificationError(AssertionError):
    """A check of `verify` failed; the message is the report."""


@dataclass(frozen=True, slots=True)
class Check:
    """Outcome of one check: passed, failed, or (`None`) not applicable to the model."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one `verify` call; prints as a table."""

    title: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        sign = {True: "passed", False: "FAILED", None: "n/a"}
        width = max(len(check.name) for check in self.checks)
        rows = [f"  {sign[c.passed]:<6}  {c.name:<{width}}  {c.detail}" for c in self.checks]
        return "\n".join([self.title, *rows])


class _NotApplicable(Exception):
    """Raised by a check that has no meaning for a model; the message says why."""


class _Failed(Exception):
    """Raised by a check that failed; the message says how."""


def verify(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> Report:
    """Checks a mechanism on a model: that it runs, is exact, and keeps the contract of attention.

    1. every layer ran: each attention module that should run a mechanism did, in one forward pass;
    2. exact: each layer's output equals the dense float64 reference on the layer's own input;
    3. finite: no NaN or infinity comes out;
    4. no future leak: changing a later token changes no earlier output (causal models);
    5. padded = unpadded: right padding, and left padding where positions can be given;
    6. cached = uncached: token by token with a cache equals one pass (generative models);
    7. packed = separate: two sequences in one row equal each alone, told apart by `position_ids` or,
       where an architecture drops those, by `cu_seq_lens_q` and `cu_seq_lens_k`.

    Args:
        model: a model with a mechanism, on any device, in any dtype; its mode and weights are kept.
        inputs: keyword arguments of a forward pass for checks 1 to 3, for models whose main input is
            not text or pixels, or to reach every part of a composite model. Default: random.

    Returns:
        The report; `print(report)` shows it.

    Raises:
        VerificationError: a check failed; the message is the report.
        ValueError: the model carries no mechanism, or no input can be made up for it.
    """
    modules = [m for m in attention_modules(model) if runs(m) in MECHANISMS]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} runs no mechanism of hf_expressive; load it with "
            f'attn_implementation="{next(iter(MECHANISMS))}" or use hf_expressive.attach(model, config).'
        )
    probe = _Probe(model, modules, inputs)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("every layer ran", probe.every_layer_ran),
        ("exact", probe.exact),
        ("finite", probe.finite),
        ("no future leak", probe.no_future_leak),
        ("padded = unpadded", probe.padded),
        ("cached = uncached", probe.cached),
        ("packed = separate", probe.packed),
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outcomes = tuple(_run(name, check) for name, check in checks)
    finally:
        model.train(training)
    mechanisms = sorted({runs(m) for m in modules})
    dtype = str(model.dtype).removeprefix("torch.")
    title = f"{type(model).__name__} with {', '.join(mechanisms)}, {dtype} on {model.device.type}"
    report = Report(title, outcomes)
    if not report.passed:
        raise VerificationError(str(report))
    return report


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except _NotApplicable as reason:
        return Check(name, None, str(reason))
    except _Failed as reason:
        return Check(name, False, str(reason))


class _Probe:
    """The model under test, inputs for it, and the checks."""

    def __init__(
        self,
        model: PreTrainedModel,
        modules: list[AttentionModule],
        inputs: Mapping[str, Any] | None,
    ) -> None:
        self.model = model
        self.modules = modules
        self.parameters = inspect.signature(model.forward).parameters
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.generator = torch.Generator().manual_seed(0)
        self.text = "input_ids" in self.parameters
        self.inputs = dict(inputs) if inputs is not None else self.random_inputs()

    # -- inputs ------------------------------------------------------------------------------------

    def random_inputs(self) -> dict[str, Any]:
        if self.text:
            ids = self.random_ids(2, _LENGTH)
            if self.is_encoder_decoder:
                return {"input_ids": ids, "decoder_input_ids": self.random_ids(2, _LENGTH)}
            return {"input_ids": ids}
        config = self.model.config
        size = getattr(config, "image_size", None)
        if self.model.main_input_name == "pixel_values" and size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            channels = getattr(config, "num_channels", 3)
            pixels = torch.rand(2, channels, height, width, generator=self.generator)
            return {"pixel_values": pixels.to(self.model.device, self.model.dtype)}
        raise ValueError(
            f"no input can be made up for {type(self.model).__name__} (main input "
            f"{self.model.main_input_name!r}); pass inputs={{…}}, the arguments of a forward pass."
        )

    def random_ids(self, batch: int, length: int) -> Tensor:
        vocabulary = self.model.config.get_text_config().vocab_size
        special = {
            value
            for part in (self.model.config, self.model.config.get_text_config())
            for name, value in part.to_dict().items()
            if name.endswith("_token_id") and isinstance(value, int)
        }
        ordinary = [token for token in range(min(vocabulary, 1000)) if token not in special]
        pick = torch.randint(len(ordinary), (batch, length), generator=self.generator)
        return torch.tensor(ordinary)[pick].to(self.model.device)

    def outputs(self, **inputs: Any) -> Tensor:
        """The main output of a forward pass, float32 or wider."""
        out = self.model(**inputs, return_dict=True)
        for name in ("logits", "last_hidden_state", "image_embeds", "text_embeds"):
            if isinstance(value := out.get(name), Tensor):
                return value if value.dtype == torch.float64 else value.float()
        tensors = [value for value in out.values() if isinstance(value, Tensor)]
        return max(tensors, key=lambda tensor: tensor.numel()).float()

    def compare(self, one: Tensor, other: Tensor, what: str) -> float:
        """Largest difference relative to the largest output.

        Raises:
            _Failed: it exceeds the tolerance of the model's dtype.
        """
        scale = other.abs().amax().clamp_min(1e-12)
        error = float((one - other).abs().amax() / scale)
        if not error <= _TOLERANCE[self.model.dtype]:
            raise _Failed(f"{what}: relative difference {error:.1e}")
        return error

    # -- checks ------------------------------------------------------------------------------------

    @contextmanager
    def recorded(self) -> Iterator[dict[str, list[tuple[AttentionCall, Tensor]]]]:
        """Calls and outputs of every mechanism by module name."""
        calls: dict[str, list[tuple[AttentionCall, Tensor]]] = {m.name: [] for m in self.modules}
        handles = []
        for found in self.modules:
            child = found.module._modules.get(CHILD)
            if isinstance(child, Mechanism):

                def record(
                    _: Any, args: tuple[AttentionCall], result: Any, name: str = found.name
                ) -> None:
                    calls[name].append((args[0], result[0]))

                handles.append(child.register_forward_hook(record))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def every_layer_ran(self) -> str:
        with self.recorded() as calls:
            self.model(**self.inputs)
        idle = [name for name, seen in calls.items() if not seen]
        if idle:
            raise _Failed(
                f"{len(idle)} of {len(calls)} attention modules did not run, first {idle[0]}; if these "
                "inputs do not reach it, pass inputs= that do"
            )
        return f"{len(calls)} attention modules"

    def exact(self) -> str:
        with self.recorded() as calls:
            self.model(**self.inputs)
        worst = 0.0
        for found in self.modules:
            child = found.module._modules.get(CHILD)
            for call, out in calls[found.name]:
                assert isinstance(child, Mechanism)
                witness, _ = child.forward(_in_float64(call))
                worst = max(worst, self.compare(out.double(), witness, found.name))
        return f"largest relative difference from the float64 reference {worst:.1e}"

    def finite(self) -> str:
        with self.recorded() as calls:
            out = self.outputs(**self.inputs)
        for name, seen in calls.items():
            for call, _ in seen:
                for part in ("query", "key", "value"):
                    if not bool(getattr(call, part).isfinite().all()):
                        raise _Failed(
                            f"the {part} of {name} is not finite: {self.model.dtype} overflowed before "
                            "attention; use bfloat16 or float32"
                        )
        if not bool(out.isfinite().all()):
            raise _Failed(f"the output is not finite in {self.model.dtype}")
        return "outputs, queries, keys and values"

    def no_future_leak(self) -> str:
        inputs, name = self.causal_inputs()
        changed = dict(inputs)
        half = _LENGTH // 2
        tokens = changed[name].clone()
        tokens[:, half:] = self.random_ids(tokens.shape[0], _LENGTH - half)
        changed[name] = tokens
        one, other = self.outputs(**inputs), self.outputs(**changed)
        self.compare(one[:, :half], other[:, :half], "a later token changed an earlier output")
        if torch.equal(one[:, half:], other[:, half:]):
            raise _Failed("a token does not change its own output")
        return "later tokens change no earlier output"

    def causal_inputs(self) -> tuple[dict[str, Tensor], str]:
        """Inputs of a causal model and the name of the causal ones."""
        if self.text and self.is_encoder_decoder:
            return self.random_inputs(), "decoder_input_ids"
        if self.text and self.model.can_generate():
            return self.random_inputs(), "input_ids"
        raise _NotApplicable("the model does not generate text")

    def padded(self) -> str:
        if not self.text or "attention_mask" not in self.parameters:
            raise _NotApplicable("the model takes no padding mask")
        inputs = self.random_inputs()
        ids, cut = inputs["input_ids"], _LENGTH - 4
        alone = self.outputs(**{**inputs, "input_ids": ids[1:, :cut], **self.second_row(inputs)})
        sides = ["right"]
        left = "position_ids" in self.parameters and not self.is_encoder_decoder
        if left and self.model.can_generate():
            sides.append("left")
        for side in sides:
            padded, mask = ids.clone(), torch.ones_like(ids)
            visible = slice(0, cut) if side == "right" else slice(_LENGTH - cut, _LENGTH)
            hidden = slice(cut, _LENGTH) if side == "right" else slice(0, _LENGTH - cut)
            padded[1, visible], mask[1, hidden] = ids[1, :cut], 0
            extra = {}
            if side == "left":
                extra["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
            both = self.outputs(**{**inputs, "input_ids": padded, "attention_mask": mask, **extra})
            row = both[1:] if self.is_encoder_decoder or both.dim() < 3 else both[1:, visible]
            self.compare(row, alone, f"{side} padding changed the output")
        return " and ".join(sides)

    def second_row(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[1:] for name, value in inputs.items() if name != "input_ids"}

    def cached(self) -> str:
        inputs, name = self.causal_inputs()
        if "past_key_values" not in self.parameters:
            raise _NotApplicable("the model takes no cache")
        whole = self.outputs(**inputs, use_cache=False)
        tokens, start = inputs[name], _LENGTH // 2
        rest = {key: value for key, value in inputs.items() if key != name}
        out = self.model(**rest, **{name: tokens[:, :start]}, use_cache=True, return_dict=True)
        for position in range(start, _LENGTH):
            if (cache := out.get("past_key_values")) is None:
                raise _NotApplicable("the model returns no cache")
            out = self.model(
                **rest,
                **{name: tokens[:, position : position + 1]},
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
            step = out["logits"] if "logits" in out else out["last_hidden_state"]
            self.compare(
                step[:, -1].to(whole.dtype),
                whole[:, position],
                f"the cache changed position {position}",
            )
        return f"{_LENGTH - start} steps"

    def packed(self) -> str:
        if self.is_encoder_decoder or "position_ids" not in self.parameters:
            raise _NotApplicable("the model takes no position_ids")
        inputs, _ = self.causal_inputs()
        ids = inputs["input_ids"]
        first, second = ids[:1, : _LENGTH - 5], ids[1:]
        row = torch.cat([first, second], dim=1)
        positions = torch.cat(
            [torch.arange(part.shape[1], device=ids.device) for part in (first, second)]
        )
        packed: dict[str, Any] = {
            "input_ids": row,
            "position_ids": positions[None],
            "use_cache": False,
        }
        alone = [self.outputs(input_ids=part) for part in (first, second)]
        try:
            self.compare_packed(self.outputs(**packed), alone)
            return "two sequences in one row, told apart by position_ids"
        except _Failed:
            if not any(p.kind is p.VAR_KEYWORD for p in self.parameters.values()):
                raise
        # Some architectures hand position_ids neither to the mask nor to attention.
        bounds = torch.tensor([0, first.shape[1], row.shape[1]], device=ids.device)
        packed |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        self.compare_packed(self.outputs(**packed), alone)
        return "only with cu_seq_lens_q and cu_seq_lens_k: the architecture drops position_ids"

    def compare_packed(self, together: Tensor, alone: list[Tensor]) -> None:
        first, second = together.split([part.shape[1] for part in alone], dim=1)
        self.compare(first, alone[0], "the first packed sequence changed")
        self.compare(second, alone[1], "the second packed sequence changed")


def _in_float64(call: AttentionCall) -> AttentionCall:
    """The same call for the dense reference in float64."""

    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    fields = {field.name: widen(getattr(call, field.name)) for field in dataclasses.fields(call)}
    return AttentionCall(**{**fields, "impl": "reference", "return_weights": False})
