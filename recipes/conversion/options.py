"""Options of the conversion, as flags of `convert.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from arguments import ATTENTION_HELP, Attention, option, require, require_at_least
from loop import OutputOptions, TrainingOptions


@dataclass
class ConversionOptions:
    _argument_group_name: ClassVar[str] = "the conversion"

    checkpoint: str = field(
        metadata={"help": "softmax model of the Hub, or folder: an encoder or a language model"}
    )
    attention: list[str] = field(
        default_factory=lambda: ["expressive:scale=learned"],
        metadata={
            "help": ATTENTION_HELP.replace(
                "what to compare: sdpa (softmax attention) and any", "what to convert to: any"
            )
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "one conversion to each kind of attention for each of these"},
    )
    batch_size: int = option(32, "texts in a step, over all processes and accumulated batches")
    gradient_accumulation_steps: int = option(1, "batches that a step is put together from")
    max_grad_norm: float = option(
        1.0, "longer gradients are shortened to this length; 0 leaves them"
    )
    evaluate_every: int = option(100, "steps between two measurements")
    checkpoint_every: int = option(50, "steps between two checkpoints, to go on from after a stop")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "checkpoint_every")
        require(
            len(set(self.seeds)) == len(self.seeds) and min(self.seeds) >= 0,
            f"--seeds must be different numbers ≥ 0, got {' '.join(map(str, self.seeds))}.",
        )
        softmax = [kind for kind in Attention.parse_all(self.attention) if kind.options is None]
        require(not softmax, "--attention sdpa is what the checkpoint has; it needs no conversion.")

    def stage(self, steps: int, learning_rate: float, warmup_steps: int) -> TrainingOptions:
        """One stage, for the training loop."""
        return TrainingOptions(
            steps=steps,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=learning_rate,
            schedule="cosine",
            warmup_steps=warmup_steps,
            weight_decay=0.0,
            max_grad_norm=self.max_grad_norm,
            evaluate_every=self.evaluate_every,
        )


@dataclass
class TransferOptions:
    _argument_group_name: ClassVar[str] = "stage 1, attention transfer"

    transfer_steps: int = option(300, "optimiser steps; 0 leaves the stage out")
    transfer_learning_rate: float = option(3e-3, "of AdamW, at its highest")
    transfer_warmup_steps: int = option(20, "steps in which the learning rate rises from 0")
    transfer: Literal["attention", "mechanism"] = option(
        "attention",
        "what learns: attention, the layers' projections and mechanisms; mechanism, these alone",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 0, "transfer_steps")


@dataclass
class TuningOptions:
    _argument_group_name: ClassVar[str] = "stage 2, tuning"

    tuning_steps: int = option(300, "optimiser steps; 0 leaves the stage out")
    tuning_learning_rate: float = option(5e-4, "of AdamW, at its highest; all weights need less")
    tuning_warmup_steps: int = option(20, "steps in which the learning rate rises from 0")
    tuning: Literal["lora", "full"] = option(
        "lora",
        "what learns: lora, low-rank updates of all linear layers, and the mechanisms; full, all",
    )
    lora_rank: int = option(16, "rank of the updates")
    distillation: float = option(
        1.0,
        "weight of the loss towards the original's outputs; language models also do without (0)",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 0, "tuning_steps", "distillation")
        require_at_least(self, 1, "lora_rank")


@dataclass
class ResultOptions(OutputOptions):
    _argument_group_name: ClassVar[str] = "output"

    base_model: str | None = option(
        None, "name of the checkpoint on the Hub, for the card; without it --checkpoint"
    )
    license: str | None = option(None, "identifier of its licence on the Hub, for the card")
