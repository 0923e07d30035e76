"""Options of the mechanisms: frozen, validated, and their form in `config.json`.

The section `hf_expressive` of a model's `config.json` holds `mechanism`, `version` (of this package
when it was written) and the options of the mechanism. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

#: The key of the section in `config.json` and the keyword of `from_pretrained`.
SECTION = "hf_expressive"


def package_version() -> str:
    from . import __version__

    return __version__


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True, kw_only=True)
class MechanismConfig:
    """Options that every mechanism shares: hybrids with softmax attention.

    Args:
        softmax_layers: indices of the attention layers that keep ordinary softmax attention, counted
            within each (sub-)model in the order of its layers.
        softmax_heads: number of leading query heads of every layer that keep softmax attention; a
            multiple of the number of query heads that share a key/value head.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    mechanism: ClassVar[str]

    softmax_layers: tuple[int, ...] = ()
    softmax_heads: int = 0

    def __post_init__(self) -> None:
        layers = self.softmax_layers
        if not isinstance(layers, list | tuple) or not all(map(_is_integer, layers)):
            raise ValueError(f"softmax_layers must be a list of integers, got {layers!r}.")
        if any(layer < 0 for layer in layers) or len(set(layers)) != len(layers):
            raise ValueError(f"softmax_layers must be distinct indices ≥ 0, got {layers!r}.")
        object.__setattr__(self, "softmax_layers", tuple(sorted(layers)))
        if not _is_integer(self.softmax_heads) or self.softmax_heads < 0:
            raise ValueError(f"softmax_heads must be an integer ≥ 0, got {self.softmax_heads!r}.")

    @property
    def needs_parameters(self) -> bool:
        """Whether attention modules must carry learned parameters."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The section for `config.json`: mechanism, version, options; JSON types only."""
        options = {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in (getattr(self, field.name),)
        }
        return {"mechanism": self.mechanism, "version": package_version(), **options}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """From the options of a section, every name checked.

        Raises:
            ValueError: an unknown option, with the known ones.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(options) - set(known)))
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(unknown)} for mechanism {cls.mechanism!r}; "
                f"known options: {', '.join(known)}."
            )
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class ExpressiveConfig(MechanismConfig):
    """Options of expressive attention, `attn_implementation="expressive"`.

    Args:
        scale: factor of the product q·k. `"module"`: the attention module's own `scaling` (dim^-½ in
            most architectures). A number: that number instead (the paper's choice is 1.0).
            `"learned"`: the module's own times one learned positive gain a head, 1 at the start.
        power: the Hill exponent n > 0 of z²ⁿ/(1 + z²ⁿ); 1 is the paper's.
        softmax_layers, softmax_heads: see `MechanismConfig`.

    Raises:
        ValueError: a value of the wrong type or out of range.

    Source: C. Gros, arXiv 2407.18601; `power`, `"learned"` and the hybrids are ours.
    """

    mechanism: ClassVar[str] = "expressive"

    scale: Literal["module", "learned"] | float = "module"
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("module", "learned"):
            if isinstance(self.scale, str) or not _is_number(self.scale) or self.scale <= 0:
                raise ValueError(
                    f"scale must be 'module', 'learned' or a positive number, got {self.scale!r}."
                )
            object.__setattr__(self, "scale", float(self.scale))
        if not _is_number(self.power) or self.power <= 0:
            raise ValueError(f"power must be a positive number, got {self.power!r}.")
        object.__setattr__(self, "power", float(self.power))

    @property
    def needs_parameters(self) -> bool:
        return self.scale == "learned"


#: The options class of each mechanism.
CONFIG_CLASSES: dict[str, type[MechanismConfig]] = {
    cls.mechanism: cls for cls in (ExpressiveConfig,)
}


def read_section(section: Mapping[str, Any] | MechanismConfig) -> MechanismConfig:
    """The options that a section of `config.json` describes.

    Raises:
        ValueError: not a mapping, an unknown mechanism or option, a bad value, or a section written
            by a newer major version of this package.
    """
    if isinstance(section, MechanismConfig):
        return section
    if not isinstance(section, Mapping):
        raise ValueError(
            f"{SECTION} must be a mapping with 'mechanism' and its options, or one of the config "
            f"classes of this package; got {type(section).__name__}."
        )
    options = dict(section)
    mechanism = options.pop("mechanism", None)
    _check_version(options.pop("version", None))
    if not isinstance(mechanism, str) or mechanism not in CONFIG_CLASSES:
        raise ValueError(
            f"{SECTION}.mechanism must be one of {', '.join(sorted(CONFIG_CLASSES))}; got {mechanism!r}."
        )
    try:
        return CONFIG_CLASSES[mechanism].from_options(options)
    except ValueError as error:
        raise ValueError(f"{SECTION} in the model's config: {error}") from None


def _check_version(version: object) -> None:
    """Refuses sections of a newer major version; a section without a version is the user's own."""
    if version is None:
        return
    head = version.split(".")[0] if isinstance(version, str) else ""
    if not (head.isascii() and head.isdigit() and len(head) < 10):
        raise ValueError(f"{SECTION}.version must be a version like '1.2.0', got {version!r}.")
    if int(head) > int(package_version().split(".")[0]):
        raise ValueError(
            f"this checkpoint was written by hf_expressive {version}, a newer major version than the "
            f"installed {package_version()}; update the package: pip install -U hf-expressive."
        )
