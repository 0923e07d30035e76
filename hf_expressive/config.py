"""Options of the mechanisms: frozen, validated, and their form in `config.json`.

The section `hf_expressive` of a model's `config.json` holds `mechanism`, `version` (of this package
when it was written) and the options of the mechanism. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

#: The key of the section in `config.json` and the keyword of `from_pretrained`.
SECTION = "hf_expressive"


#: No model has as many layers or heads; a larger number is no count but an accident.
_MOST = 2**31 - 1


def package_version() -> str:
    from . import __version__

    return __version__


def shown(value: object) -> str:
    """A value for an error message: no control characters, never more than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, nesting without end
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if not _is_integer(value) and not isinstance(value, float):
        return False
    # False for nan, for infinity and for integers that no float can hold.
    return abs(value) <= sys.float_info.max  # type: ignore[arg-type]


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
            raise ValueError(f"softmax_layers must be a list of integers, got {shown(layers)}.")
        if not all(0 <= layer <= _MOST for layer in layers) or len(set(layers)) != len(layers):
            raise ValueError(f"softmax_layers must be distinct indices ≥ 0, got {shown(layers)}.")
        object.__setattr__(self, "softmax_layers", tuple(sorted(layers)))
        if not _is_integer(self.softmax_heads) or not 0 <= self.softmax_heads <= _MOST:
            raise ValueError(
                f"softmax_heads must be an integer ≥ 0, got {shown(self.softmax_heads)}."
            )

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
                f"unknown option {shown(', '.join(unknown))[1:-1]} for mechanism {cls.mechanism!r}; "
                f"known options: {', '.join(known)}."
            )
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class ExpressiveConfig(MechanismConfig):
    """Options of expressive attention, `attn_implementation="expressive"`.

    Args:
        scale: factor of the product q·k. `"module"`: the attention module's own `scaling` (dim^-½ in
            most architectures). A number: that number instead (the paper's choice is 1.0).
            `"learned"`: the module's own times one learned positive gain a head.
        power: the Hill exponent n > 0 of z²ⁿ/(1 + z²ⁿ); 1 is the paper's.
        gain: what the learned gain starts with. Below 1 most weights start well under their bound of
            1, where a larger |z| still means a larger weight.
        sink: add a learned constant exp(s), one a head, to the sum of the weights, s = 0 at the start:
            a query that no key answers then gets an output near zero instead of a mean of values.
        softmax_layers, softmax_heads: see `MechanismConfig`.

    Raises:
        ValueError: a value of the wrong type or out of range.

    Source: C. Gros, arXiv 2407.18601; `power`, `"learned"`, `sink` and the hybrids are ours.
    """

    mechanism: ClassVar[str] = "expressive"

    scale: Literal["module", "learned"] | float = "module"
    power: float = 1.0
    gain: float = 1.0
    sink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("module", "learned"):
            if isinstance(self.scale, str) or not _is_number(self.scale) or self.scale <= 0:
                raise ValueError(
                    f"scale must be 'module', 'learned' or a positive number, got {shown(self.scale)}."
                )
            object.__setattr__(self, "scale", float(self.scale))
        if not _is_number(self.power) or self.power <= 0:
            raise ValueError(f"power must be a positive number, got {shown(self.power)}.")
        object.__setattr__(self, "power", float(self.power))
        if not _is_number(self.gain) or self.gain <= 0:
            raise ValueError(f"gain must be a positive number, got {shown(self.gain)}.")
        object.__setattr__(self, "gain", float(self.gain))
        if self.gain != 1.0 and self.scale != "learned":
            raise ValueError(f"gain={self.gain} has no meaning without scale='learned'.")
        if not isinstance(self.sink, bool):
            raise ValueError(f"sink must be true or false, got {shown(self.sink)}.")

    @property
    def needs_parameters(self) -> bool:
        return self.scale == "learned" or self.sink


@dataclass(frozen=True, kw_only=True)
class ImplicitKernelConfig(MechanismConfig):
    """Options of implicit kernel attention, `attn_implementation="implicit_kernel"`.

    An option that the chosen kernel does not read must keep its default.

    Args:
        kernel: `"rbf"` (with p = 2 this is softmax attention), `"stationary"`, `"direct"` (learned
            frequencies, non-stationary), `"implicit"` (frequencies from learned noise through learned
            generators), `"copula"` (as implicit, the noise of the heads coupled).
        num_features: M ≤ 65536, frequencies a density; even for `"implicit"` and `"copula"`, where one
            half each comes from noise around +μ and −μ.
        p: exponent ≥ 1 of the magnitudes ‖k‖_p², or `"learned"`: one a key/value head, above 1, 2 at
            the start.
        norm_dropout: probability with which the magnitude of a key is dropped from a head, in training
            only. Magnitudes of a pretrained model can be large; converting one, prefer 0.
        epsilon: ε ≥ 0 of the weight k² + ε.
        init: how `"stationary"` and `"direct"` start. `"kaiming"`: uniform within ±d^-½, the authors'
            choice. `"gaussian"`: 2πW ~ N(0, 1/(2√d)), whose squared kernel is the RBF kernel of softmax
            attention up to the sampling error of M frequencies. `"orthogonal"`: the same with each d
            frequencies orthogonal to each other, which errs less: the choice for converting.
        condition: what the noise of `"implicit"` and `"copula"` depends on. `"mean"`: learned constants
            and the mean query and key of the sequence, as in the paper; every position then sees the
            whole sequence, so it is for encoders only. `"constant"`: learned constants. `"auto"`:
            `"mean"` where an attention module is the self-attention of an encoder, else `"constant"`.
        prior_scale: standard deviation (not the variance) of the noise's prior, and of the noise at the
            start.
        kl_weight: weight of KL(noise density ‖ prior) in `auxiliary_loss`.
        copula_weight: weight of the copula entropy in `auxiliary_loss`.
        seed: seed of the noise that is stored for evaluation.
        authors_code: reproduce three places where the published code departs from the paper: the
            magnitudes are divided by 2·d^¼ in place of 2√d; the copula multiplies the noise by the row
            sums of L in place of L, which couples nothing; exp(log σ²) is the standard deviation.
        cache_features: whether the features of cached keys are kept from one decoding step to the next.
            With heads of 128 and 64 features they take 1.25 times the memory of the key/value cache on
            a GPU; without them a step computes them again, and gives the same.
        softmax_layers, softmax_heads: see `MechanismConfig`.

    Raises:
        ValueError: a value of the wrong type or out of range, or an option that the kernel does not
            read.

    Source: K. Song, Y. Jung, D. Kim, I.-C. Moon, AAAI 2021, arXiv 2006.06147; `p="learned"`,
    `init="gaussian"` and `"orthogonal"`, `condition="constant"` and the hybrids are ours.
    """

    mechanism: ClassVar[str] = "implicit_kernel"

    kernel: Literal["rbf", "stationary", "direct", "implicit", "copula"] = "direct"
    num_features: int = 64
    p: Literal["learned"] | float = 2.0
    norm_dropout: float = 0.1
    epsilon: float = 1e-5
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    condition: Literal["auto", "mean", "constant"] = "auto"
    prior_scale: float = 0.1
    kl_weight: float = 0.1
    copula_weight: float = 1.0
    seed: int = 0
    authors_code: bool = False
    cache_features: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("kernel", self.kernel, ("rbf", "stationary", "direct", "implicit", "copula"))
        _check_choice("init", self.init, ("kaiming", "gaussian", "orthogonal"))
        _check_choice("condition", self.condition, ("auto", "mean", "constant"))
        if not _is_integer(self.num_features) or not 1 <= self.num_features <= _MOST_FEATURES:
            raise ValueError(
                f"num_features must be an integer from 1 to {_MOST_FEATURES}, got "
                f"{shown(self.num_features)}."
            )
        if self.generates_frequencies and self.num_features % 2:
            raise ValueError(
                f"num_features must be even for kernel={self.kernel!r}, got {self.num_features}."
            )
        if self.p != "learned" and (not _is_number(self.p) or self.p < 1):
            raise ValueError(f"p must be 'learned' or a number ≥ 1, got {shown(self.p)}.")
        if not _is_number(self.norm_dropout) or not 0 <= self.norm_dropout < 1:
            raise ValueError(f"norm_dropout must be in [0, 1), got {shown(self.norm_dropout)}.")
        for name in ("epsilon", "kl_weight", "copula_weight"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a number ≥ 0, got {shown(getattr(self, name))}.")
        if not _is_number(self.prior_scale) or self.prior_scale <= 0:
            raise ValueError(
                f"prior_scale must be a positive number, got {shown(self.prior_scale)}."
            )
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer from 0 to 2⁶³ − 1, got {shown(self.seed)}.")
        for name in ("authors_code", "cache_features"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {shown(getattr(self, name))}.")
        for field in dataclasses.fields(self):
            kernels = _READ_BY.get(field.name)
            value = getattr(self, field.name)
            if kernels is not None and self.kernel not in kernels and value != field.default:
                raise ValueError(
                    f"{field.name}={shown(value)} has no meaning for kernel={self.kernel!r}; it is an "
                    f"option of {', '.join(kernels)}."
                )
            if isinstance(field.default, float) and _is_number(value):
                object.__setattr__(self, field.name, float(value))

    @property
    def generates_frequencies(self) -> bool:
        """Whether frequencies come from noise through generators."""
        return self.kernel in ("implicit", "copula")

    @property
    def needs_parameters(self) -> bool:
        return self.kernel != "rbf" or self.p == "learned"


#: A thousand times what the paper takes; more can only be a mistake, and would be asked of the memory.
_MOST_FEATURES = 65536
_GENERATED = ("implicit", "copula")
_FEATURES = ("stationary", "direct", *_GENERATED)
#: The kernels that read an option of `ImplicitKernelConfig`, where not all do.
_READ_BY: dict[str, tuple[str, ...]] = {
    "num_features": _FEATURES,
    "epsilon": _FEATURES,
    "init": ("stationary", "direct"),
    "condition": _GENERATED,
    "prior_scale": _GENERATED,
    "kl_weight": _GENERATED,
    "copula_weight": ("copula",),
    "seed": _GENERATED,
    "cache_features": _FEATURES,
}


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}.")


#: The options class of each mechanism.
CONFIG_CLASSES: dict[str, type[MechanismConfig]] = {
    cls.mechanism: cls for cls in (ExpressiveConfig, ImplicitKernelConfig)
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
            f"{SECTION}.mechanism must be one of {', '.join(sorted(CONFIG_CLASSES))}; got "
            f"{shown(mechanism)}."
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
        raise ValueError(f"{SECTION}.version must be a version like '1.2.0', got {shown(version)}.")
    if int(head) > int(package_version().split(".")[0]):
        raise ValueError(
            f"this checkpoint was written by hf_expressive {shown(version)[1:-1]}, a newer major "
            f"version than the installed {package_version()}; update the package: pip install -U "
            "hf-expressive."
        )
