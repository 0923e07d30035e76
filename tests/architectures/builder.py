"""Build a tiny random model of any Transformers architecture that asks the attention registry."""

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .exceptions import CONFIG, KEEP_EAGER, MODEL, NOISE
from .inputs import Padding, make_inputs
from .shrink import shrink
from .special_inputs import INPUTS

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
# The most telling head first.
_HEADS = (
    "ForConditionalGeneration",
    "ForBlockDiffusion",
    "ForMaskedLM",
    "ForCausalLM",
    "LMHeadModel",
    "ForCTC",
    "ForRNNT",
    "ForObjectDetection",
    "ForUniversalSegmentation",
    "ForPrediction",
    "Model",
    "",
)


@cache
def _modeling_files() -> dict[str, str]:
    """Architecture (name of its modeling file) -> module, where the file mentions the registry."""
    models = Path(transformers.__file__).parent / "models"
    files = sorted(models.glob("*/modeling_*.py"))
    return {
        file.stem.removeprefix("modeling_"): f"transformers.models.{file.parent.name}.{file.stem}"
        for file in files
        if _REGISTRY in file.read_text(encoding="utf-8")
    }


def architectures() -> list[str]:
    """All architectures of the installed Transformers that look attention up in the registry."""
    return list(_modeling_files())


def parts() -> list[str]:
    """Further models, "architecture/part", for attention that an architecture's first model lacks."""
    return sorted(name for name in MODEL if "/" in name and name.split("/")[0] in _modeling_files())


def _own_models(module: Any) -> list[type[PreTrainedModel]]:
    return [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, PreTrainedModel)
        and member.__module__ == module.__name__
        and inspect.isclass(member.config_class)
        and not member.__name__.endswith(
            ("PreTrainedModel", "PreTrainedModelForConditionalGeneration")
        )
    ]


def _sub_configs(config: PreTrainedConfig) -> int:
    return sum(isinstance(value, PreTrainedConfig) for value in vars(config).values())


def model_class(name: str) -> type[PreTrainedModel]:
    """The class to test: the widest configuration, then the most telling head."""
    module = importlib.import_module(_modeling_files()[name.split("/")[0]])
    if name in MODEL:
        return getattr(module, MODEL[name])

    def rank(cls: type[PreTrainedModel]) -> tuple[int, int]:
        try:
            parts = _sub_configs(cls.config_class())  # type: ignore[misc]
        except Exception:  # no defaults: cannot be built without help
            parts = -1
        return -parts, next(
            index for index, head in enumerate(_HEADS) if cls.__name__.endswith(head)
        )

    return min(_own_models(module), key=rank)


def tiny_config(name: str) -> PreTrainedConfig:
    return shrink(model_class(name).config_class(), CONFIG.get(name))  # type: ignore[misc]


@torch.no_grad()
def _randomise(model: nn.Module, seed: int, noise: float) -> None:
    """Add noise to every parameter: zero gates and tiny scales must not hide the attention."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        deviation = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        if (
            parameter.ndim > 2
        ):  # convolutions come in deep stacks with ReLU, which halves the variance
            deviation *= 2**0.5
        parameter.add_(torch.randn(parameter.shape, generator=random), alpha=noise * deviation)


@dataclass
class Case:
    name: str
    family: str
    model: PreTrainedModel

    def inputs(self, padding: Padding = "none", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of a forward pass, the same for every call with the same arguments."""
        return make_inputs(self.model, padding, seed, special=INPUTS.get(self.name))

    @staticmethod
    def can_pad(inputs: dict[str, Any]) -> bool:
        """Whether `inputs`, made with padding, really hide tokens."""
        return "attention_mask" in inputs and not bool(inputs["attention_mask"].all())


def _per_part(
    config: PreTrainedConfig, choice: str, eager: tuple[str, ...], path: str = ""
) -> dict[str, Any]:
    """`choice` for a configuration and its parts, but "eager" for the parts named in `eager`."""
    chosen: dict[str, Any] = {"": "eager" if path in eager else choice}
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig):
            dotted = f"{path}.{name}" if path else name
            chosen[name] = _per_part(part, "eager" if dotted in eager else choice, eager, dotted)
    return chosen


def family(model: PreTrainedModel) -> str:
    """What kind of model it is, by what its `forward` takes and what its configuration is made of."""
    names = set(inspect.signature(model.forward).parameters)
    pieces = " ".join(
        name for name, value in vars(model.config).items() if isinstance(value, PreTrainedConfig)
    )
    sees = bool(
        names & {"pixel_values", "pixel_values_videos", "flattened_patches", "inference_session"}
    )
    hears = bool(names & {"input_values", "input_features", "codes", "audio_codes"})
    reads = "input_ids" in names
    if "past_values" in names:
        return "time series"
    if reads and (sees or hears or "vision" in pieces or "audio" in pieces):
        return "multimodal"
    if sees or hears:
        return "vision" if sees else "audio"
    if reads and model.config.is_encoder_decoder:
        return "encoder-decoder"
    if reads:
        return "decoder" if model.can_generate() else "encoder"
    return "other"


def _reach(model: PreTrainedModel, choice: str) -> None:
    """Gives `choice` to the parts that Transformers does not give it to (the package does)."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation_internal = choice


def build(
    name: str,
    attn_implementation: str | dict[str, Any] = "eager",
    seed: int = 0,
    whole: bool = False,
    options: Any = None,
) -> Case:
    """Build architecture `name` tiny, on CPU, in float32 and evaluation mode.

    The weights depend on `seed` only.
    Parts that cannot take an attention implementation (`KEEP_EAGER`) stay eager, unless `whole`.
    `options` are those of a mechanism.
    """
    torch.manual_seed(seed)
    cls = model_class(name)
    config = tiny_config(name)
    choice: Any = attn_implementation
    if name in KEEP_EAGER and not whole and isinstance(choice, str):
        choice = _per_part(config, attn_implementation, KEEP_EAGER[name])
    more = {} if options is None else {"hf_expressive": options}
    model = cls._from_config(config, attn_implementation=choice, dtype=torch.float32, **more)
    if isinstance(choice, str):
        _reach(model, choice)
    _randomise(model, seed, NOISE.get(name, 1.0))
    return Case(name, family(model), model.eval())
