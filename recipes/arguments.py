"""What the command lines of the recipes share: options with help, kinds of attention to compare."""

from __future__ import annotations

import json
import re
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedConfig, PreTrainedModel

from hf_expressive.config import SECTION, MechanismConfig
from hf_expressive.registry import MECHANISMS

#: Help for an option that takes kinds of attention.
ATTENTION_HELP = (
    f"what to compare: sdpa (softmax attention) and any of {', '.join(sorted(MECHANISMS))}, with "
    "options after a colon, such as expressive:power=2,scale=learned"
)


def option(default: Any, help: str) -> Any:
    """A field of an options dataclass, with its explanation for `--help`."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, sentence: str) -> None:
    """Raises ValueError with the sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def require_at_least(options: object, least: int, *names: str) -> None:
    """Raises ValueError naming the first of the options that is smaller than `least`."""
    for name in names:
        value = getattr(options, name)
        require(value >= least, f"--{name} must be at least {least}, got {value}.")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and shows the defaults."""


def parse(options: Sequence[Any], script: str, description: str | None) -> tuple[Any, ...]:
    """One instance of each options dataclass, from the command line.

    What a dataclass refuses by raising ValueError ends the program with that sentence.
    """
    parser = HfArgumentParser(
        options,
        usage=f"accelerate launch [options of Accelerate] recipes/{script} [options]",
        description=description,
        formatter_class=_HelpFormatter,
        # `--step` is a misspelt option, not a short one.
        allow_abbrev=False,
    )
    try:
        return parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))


@dataclass(frozen=True)
class Attention:
    """One kind of attention to compare.

    Attributes:
        text: as given on the command line.
        implementation: name for `attn_implementation`.
        options: of a mechanism of this package; `None` for attention of Transformers itself.
    """

    text: str
    implementation: str
    options: MechanismConfig | None

    @classmethod
    def parse(cls, text: str) -> Attention:
        """From `name` or `name:option=value,…`; values are JSON, or bare words.

        Raises:
            ValueError: an unknown name or option, or a bad value.
        """
        name, _, assignments = text.partition(":")
        if name not in MECHANISMS:
            known = ", ".join(["sdpa", *sorted(MECHANISMS)])
            require(name == "sdpa", f"--attention must be one of {known}; got {name!r}.")
            require(not assignments, f"--attention sdpa takes no options, got {assignments!r}.")
            return cls(text, name, None)
        options = {}
        # A comma inside brackets belongs to a list.
        for assignment in re.split(r",(?![^\[]*\])", assignments) if assignments else ():
            key, equals, value = assignment.partition("=")
            require(bool(equals), f"--attention {text}: expected option=value, got {assignment!r}.")
            try:
                options[key] = json.loads(value)
            except json.JSONDecodeError:
                options[key] = value
        try:
            return cls(text, name, MECHANISMS[name].config.from_options(options))
        except ValueError as error:
            raise ValueError(f"--attention {text}: {error}") from None

    @classmethod
    def parse_all(cls, texts: Sequence[str]) -> list[Attention]:
        """Every kind asked for.

        Raises:
            ValueError: see `parse`; also one kind named twice.
        """
        found = [cls.parse(text) for text in texts]
        kinds = {(attention.implementation, attention.options) for attention in found}
        require(len(kinds) == len(found), f"--attention names one kind twice: {' '.join(texts)}.")
        return found

    @property
    def section(self) -> dict[str, Any]:
        """Mechanism and options, as in `config.json`."""
        if self.options is None:
            return {"mechanism": self.implementation}
        return self.options.to_dict()

    @property
    def file_name(self) -> str:
        """The text without what a file name had better not contain."""
        return re.sub(r"[^\w.=-]+", "-", self.text).strip("-")

    def causal_lm(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A causal language model with this attention and random weights."""
        return self.build(AutoModelForCausalLM.from_config, config)

    def build(
        self, from_config: Callable[..., PreTrainedModel], config: PreTrainedConfig
    ) -> PreTrainedModel:
        """A model with this attention and random weights, by an auto class's `from_config`."""
        if self.options is not None:
            setattr(config, SECTION, self.options)
        return from_config(config, attn_implementation=self.implementation)

    def load(
        self, from_pretrained: Callable[..., PreTrainedModel], checkpoint: str, **options: Any
    ) -> PreTrainedModel:
        """A checkpoint with this attention, by an auto class's `from_pretrained` and its options."""
        if self.options is not None:
            options[SECTION] = self.options
        return from_pretrained(checkpoint, attn_implementation=self.implementation, **options)
