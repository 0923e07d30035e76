"""The table of mechanisms, and their entry into Transformers' two registries.

Both registries are needed: a name without a mask function silently gets no mask at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from .attention.base import Mechanism
from .attention.contract import read_call
from .attention.expressive import ExpressiveAttention
from .attention.implicit_kernel import ImplicitKernelAttention
from .attention.sequence_share import mask_function, share_of
from .config import (
    CONFIG_CLASSES,
    SECTION,
    ExpressiveConfig,
    ImplicitKernelConfig,
    MechanismConfig,
    read_section,
)

#: Name of the child module that carries a mechanism on each attention module.
CHILD = "mechanism"


@dataclass(frozen=True, slots=True)
class Entry:
    """One mechanism: its options and the module that computes it."""

    config: type[MechanismConfig]
    module: type[Mechanism]

    @property
    def name(self) -> str:
        return self.config.mechanism

    def __post_init__(self) -> None:
        # Transformers reads a meaning into these parts of a name.
        reserved = ("flash", "sdpa", "flex_attention", "paged|", "/")
        if any(part in self.name for part in reserved) or self.name == "eager":
            raise ValueError(
                f"mechanism name {self.name!r} contains one of {reserved} or is 'eager'."
            )


#: The table. A new mechanism is a file in `attention/` and a row here.
MECHANISMS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(ExpressiveConfig, ExpressiveAttention),
        Entry(ImplicitKernelConfig, ImplicitKernelAttention),
    )
}


def options_of(config: PreTrainedConfig, mechanism: str) -> MechanismConfig:
    """The options of a mechanism in a model's config; defaults where the config has no section.

    Raises:
        ValueError: the section belongs to another mechanism, or is malformed.
    """
    section = getattr(config, SECTION, None)
    if section is None:
        return CONFIG_CLASSES[mechanism]()
    options = read_section(section)
    if options.mechanism != mechanism:
        raise ValueError(
            f'attn_implementation="{mechanism}" was asked for, but the {SECTION} section of the '
            f'config describes "{options.mechanism}"; pass '
            f"{SECTION}={MECHANISMS[mechanism].config.__name__}(…) as well."
        )
    return options


def _attention_function(mechanism: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        child = getattr(module, CHILD, None)
        if not isinstance(child, MECHANISMS[mechanism].module):
            raise RuntimeError(
                f'{type(module).__name__} runs attn_implementation="{mechanism}" but was not prepared '
                "for it; call hf_expressive.attach(model, config) on the whole model."
            )
        if (share := share_of(attention_mask)) is not None:
            key, value, attention_mask = share.exchange(query, key, value, attention_mask, kwargs)
        call = read_call(module, query, key, value, attention_mask, scaling, dropout, kwargs)
        out, weights = child(call)
        return out.transpose(1, 2).contiguous(), weights

    return attention_forward


def register() -> None:
    """Enters every mechanism into Transformers' attention and mask registries; idempotent."""
    for name in MECHANISMS:
        AttentionInterface.register(name, _attention_function(name))
        AttentionMaskInterface.register(name, mask_function)
