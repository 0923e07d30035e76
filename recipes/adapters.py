"""LoRA adapters of variants: they carry the mechanism's parameters and know what they belong on.

Low-rank updates trained beside one kind of attention mean nothing beside another, and PEFT loads them
onto any model whose layers have the right names. So the adapter of a variant is written under a kind
of its own, which PEFT does not know and therefore refuses, with the mechanism's options; `load_adapter`
compares these with the model that it is to be put on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arguments import require
from peft import LoraConfig, PeftModel, get_peft_model
from reporting import write_text
from transformers import PreTrainedModel

import hf_expressive
from hf_expressive.config import SECTION

#: What stands for PEFT's own `LORA` in the adapter of a variant.
KIND = "HF_EXPRESSIVE_LORA"
_CONFIG = "adapter_config.json"


def add_adapter(model: PreTrainedModel, **options: Any) -> PeftModel:
    """A model with LoRA layers; the mechanism's parameters are trained in full.

    Args:
        model: with or without a mechanism.
        options: of PEFT's `LoraConfig`.
    """
    own = hf_expressive.modules_to_save(model)
    return get_peft_model(model, LoraConfig(modules_to_save=own or None, **options))


def section_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The mechanism's options in a model's config, without the package's version."""
    section = getattr(model.config, SECTION)
    if section is None:
        return None
    return {key: value for key, value in section.items() if key != "version"}


def save_adapter(
    model: PeftModel, folder: Path, state_dict: Mapping[str, Any] | None = None
) -> None:
    """Writes the adapter; that of a variant in a form that PEFT alone refuses."""
    model.save_pretrained(str(folder), state_dict=state_dict)
    section = section_of(model.get_base_model())
    if section is not None:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        config |= {"peft_type": KIND, SECTION: section}
        write_text(folder / _CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(base: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Puts a saved adapter onto its base.

    Raises:
        ValueError: the adapter was trained with another mechanism, or with other options of it, than
            the base runs.
    """
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    trained, given = config.pop(SECTION, None), section_of(base)
    require(
        trained == given,
        f"the adapter in {folder} belongs on a base with {_shown(trained)}, but this base runs "
        f"{_shown(given)}; load it with attn_implementation and {SECTION} as the adapter's.",
    )
    config["peft_type"] = "LORA"
    known = LoraConfig.from_peft_type(**config)
    known.inference_mode = not is_trainable
    return PeftModel.from_pretrained(base, str(folder), config=known, is_trainable=is_trainable)


def _shown(section: Mapping[str, Any] | None) -> str:
    if section is None:
        return "softmax attention"
    options = ", ".join(f"{key}={value}" for key, value in section.items() if key != "mechanism")
    return f"{section['mechanism']} ({options})"
