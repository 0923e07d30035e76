"""Next-token prediction on NT(N, τ) sequences: softmax attention against hf_expressive's.

    x_t = (x_{t−1} + x_{t−τ}) mod N

The first τ symbols of a sequence are drawn at random, two earlier ones determine every later one.
A model that attends to the right two places and adds modulo N predicts all of those.

    accelerate launch recipes/nt_prediction.py
    accelerate launch recipes/nt_prediction.py --basis 8 --delay 5 --seeds 0 1 2 3 4
    accelerate launch recipes/nt_prediction.py --attention sdpa expressive:power=2,scale=1

Every kind of attention is trained from the same initial weights, on the same data in the same
order, once for each seed. The output folder gets results.json, accuracy.png and a folder for each
trained model, which AutoModelForCausalLM.from_pretrained loads; a model with a mechanism of
hf_expressive gets a model card.

The task is that of C. Gros, arXiv 2407.18601, as far as we know it. Width, length, optimiser and
number of steps are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from arguments import Attention, option, parse, require, require_at_least
from datasets import Dataset, DatasetDict, Features, List, Value
from numpy.typing import NDArray
from supervised import Batch, OutputOptions, Task, TrainingOptions, compare, start
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

METRIC = str(Path(__file__).parent / "metrics" / "masked_accuracy")

#: The reference of a position that does not count.
IGNORED = -100


@dataclass
class TaskOptions:
    _argument_group_name: ClassVar[str] = "the task"

    basis: int = option(16, "N: how many different symbols there are")
    delay: int = option(5, "τ: how far back the older of the two addends lies")
    length: int = option(32, "symbols in a sequence")
    train_size: int = option(
        None,
        "different sequences to train on; without it 65536, or all others where there are fewer",
    )
    validation_size: int = option(
        2048, "different sequences to measure on, none of them trained on"
    )

    def __post_init__(self) -> None:
        require_at_least(self, 2, "basis", "delay")
        require(
            self.length > self.delay,
            f"--length must exceed --delay, which is {self.delay}, or no symbol is determined; got "
            f"{self.length}.",
        )
        there_are = self.basis**self.delay
        if self.train_size is None:
            self.train_size = max(1, min(65536, there_are - self.validation_size))
        require_at_least(self, 1, "train_size", "validation_size")
        wanted = self.train_size + self.validation_size
        require(
            wanted <= there_are,
            f"NT({self.basis}, {self.delay}) has only {there_are} different sequences, but "
            f"--train_size and --validation_size ask for {wanted}; lower them.",
        )


@dataclass
class ModelOptions:
    _argument_group_name: ClassVar[str] = "the model"

    architecture: Literal["gpt2", "llama"] = option(
        "gpt2", "gpt2: learned absolute positions; llama: rotary positions"
    )
    width: int = option(32, "size of the hidden state; the feed-forward layer's is four times that")
    layers: int = option(1, "number of layers")
    heads: int = option(1, "attention heads in a layer; must divide --width")
    initializer_range: float = option(
        None,
        "standard deviation of the initial weights; without it width^-0.5, which keeps the size of "
        "what passes through (the 0.02 of Transformers is made for wide models)",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "width", "layers", "heads")
        require(
            self.width % self.heads == 0,
            f"--heads must divide --width, which is {self.width}; got {self.heads}.",
        )
        if self.initializer_range is None:
            self.initializer_range = self.width**-0.5
        require(
            self.initializer_range > 0,
            f"--initializer_range must be positive, got {self.initializer_range}.",
        )


@dataclass
class NTTraining(TrainingOptions):
    steps: int = option(1000, "optimiser steps of a run")
    batch_size: int = option(256, "sequences in a step, over all processes and accumulated batches")
    learning_rate: float = option(2e-3, "of Adam, at its highest")
    schedule: str = option("constant_with_warmup", "how it goes on after the warm-up, by its name")
    warmup_steps: int = option(0, "steps in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "of weight matrices")
    max_grad_norm: float = option(
        0.0, "longer gradients are shortened to this length; 0 leaves them"
    )
    evaluate_every: int = option(25, "steps between two measurements")


# ---- data ----------------------------------------------------------------------------------------


def sequences(basis: int, delay: int, length: int, count: int, seed: int) -> NDArray[np.int64]:
    """`count` different NT(basis, delay) sequences, uniformly at random.

    Returns:
        (count, length), in each row x_t = (x_{t−1} + x_{t−delay}) mod basis from t = delay on.
    """
    generator = np.random.default_rng(seed)
    heads = np.empty((0, delay), dtype=np.int64)
    while len(heads) < count:
        heads = np.concatenate([heads, generator.integers(basis, size=(count, delay))])
        _, first = np.unique(heads, axis=0, return_index=True)
        heads = heads[np.sort(first)]
    rows = np.empty((count, length), dtype=np.int64)
    rows[:, :delay] = heads[:count]
    for t in range(delay, length):
        rows[:, t] = (rows[:, t - 1] + rows[:, t - delay]) % basis
    return rows


def nt_dataset(task: TaskOptions, seed: int) -> DatasetDict:
    """Splits `train` and `validation` with the column `input_ids`; no sequence is in both."""
    count = task.train_size + task.validation_size
    rows = sequences(task.basis, task.delay, task.length, count, seed)
    features = Features({"input_ids": List(Value("int64"), length=task.length)})
    splits = {"train": rows[: task.train_size], "validation": rows[task.train_size :]}
    return DatasetDict(
        {
            split: Dataset.from_dict({"input_ids": part}, features=features)
            for split, part in splits.items()
        }
    ).with_format("torch")


# ---- model ---------------------------------------------------------------------------------------


def model_config(options: ModelOptions, task: TaskOptions) -> PreTrainedConfig:
    """A small decoder without dropout, input and output embeddings tied."""
    special: dict[str, dict[str, Any]] = {
        "gpt2": {
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            # GPT-2's own activation as one operation, not eight: a third of the time of a step.
            "activation_function": "gelu_pytorch_tanh",
        },
        "llama": {"intermediate_size": 4 * options.width, "tie_word_embeddings": True},
    }
    return AutoConfig.for_model(
        options.architecture,
        vocab_size=task.basis,
        max_position_embeddings=task.length,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        initializer_range=options.initializer_range,
        # Every symbol is an ordinary one.
        bos_token_id=None,
        eos_token_id=None,
        **special[options.architecture],
    )


def determined_loss(logits: Tensor, rows: Tensor, delay: int) -> Tensor:
    """Cross-entropy in nats of the determined symbols, the mean over each sequence, (batch,).

    Args:
        logits: (batch, length, basis).
        rows: (batch, length).
        delay: τ. The first τ symbols are random: there is nothing to learn from them.
    """
    predictions = logits[:, delay - 1 : -1].transpose(1, 2)
    return cross_entropy(predictions, rows[:, delay:], reduction="none").mean(dim=1)


# ---- the task ------------------------------------------------------------------------------------


class NTPrediction(Task):
    """One NT(N, τ) task; the data of a run are drawn from its seed."""

    name = "nt_prediction"
    auto_class = AutoModelForCausalLM
    metric_key = "accuracy"

    def __init__(self, task: TaskOptions, model: ModelOptions) -> None:
        self.task, self.model = task, model
        self.metric = evaluate.load(METRIC, keep_in_memory=True)

    @property
    def title(self) -> str:
        return f"nt-{self.task.basis}-{self.task.delay}"

    def draw(self, seed: int) -> None:
        self.splits = nt_dataset(self.task, seed)

    def build(self, attention: Attention) -> PreTrainedModel:
        return attention.causal_lm(model_config(self.model, self.task))

    def collate(self, rows: Sequence[Any]) -> Batch:
        return {"input_ids": torch.stack(list(rows))}

    def loader(self, split: str, batch_size: int, steps: int | None = None) -> DataLoader[Any]:
        # One tensor, since picking rows out of a table would take longer than a training step.
        rows: Any = self.splits[split][:]["input_ids"]
        sampler = None if steps is None else RandomSampler(rows, num_samples=steps * batch_size)
        return DataLoader(rows, batch_size=batch_size, sampler=sampler, collate_fn=self.collate)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return determined_loss(logits, batch["input_ids"], self.task.delay)

    def measure(
        self, accelerator: Accelerator, model: nn.Module, validation: Iterable[Batch]
    ) -> dict[str, float]:
        """`loss` and `accuracy` on the determined symbols."""
        delay, losses = self.task.delay, []
        for batch in validation:
            rows = batch["input_ids"]
            logits = model(input_ids=rows, use_cache=False).logits
            references = rows[:, 1:].clone()
            references[:, : delay - 1] = IGNORED
            loss, predicted, true = accelerator.gather_for_metrics(
                (determined_loss(logits, rows, delay), logits[:, :-1].argmax(-1), references)
            )
            losses.append(loss)
            self.metric.add_batch(
                predictions=predicted.cpu().numpy(), references=true.cpu().numpy()
            )
        accuracy = self.metric.compute(ignore_index=IGNORED)["accuracy"]
        return {"loss": torch.cat(losses).mean().item(), "accuracy": accuracy}

    def describe(self) -> dict[str, Any]:
        return describe(self.task)


def describe(task: TaskOptions) -> dict[str, Any]:
    """The task in the terms of `reporting.Record`."""
    name = f"NT({task.basis}, {task.delay})"
    return {
        "type": "text-generation",
        "name": f"{name} sequence prediction",
        "description": (
            f"Predict the next symbol of sequences x_t = (x_(t-1) + x_(t-{task.delay})) mod "
            f"{task.basis}. The first {task.delay} of their {task.length} symbols are random, and "
            "determine the others."
        ),
        "dataset": {
            "name": name,
            "type": "generated",
            "split": "validation",
            "args": {"basis": task.basis, "delay": task.delay, "length": task.length},
            "description": (
                f"{task.train_size} sequences to train on and {task.validation_size} others to "
                "measure on, all different, generated from the seed of the run."
            ),
        },
        "metric": {
            "type": "accuracy",
            "key": "accuracy",
            "name": "accuracy",
            "description": (
                "Accuracy is the share of the determined symbols of the validation sequences that "
                "the model predicts right, given all symbols before; after the last training step."
            ),
            "range": [0.0, 1.0],
            "chance": 1 / task.basis,
        },
        "training": (
            "Adam with a constant learning rate, on the cross-entropy of the determined symbols; no "
            "dropout, no weight decay."
        ),
        "limits": [
            f"It predicts {name} sequences of up to {task.length} symbols and nothing else: it is "
            "a demonstration of attention, not a language model."
        ],
    }


def main() -> None:
    task, model, training, output = parse(
        [TaskOptions, ModelOptions, NTTraining, OutputOptions], "nt_prediction.py", __doc__
    )
    accelerator, folder = start(NTPrediction.name, training, output)
    with accelerator.main_process_first():  # one process copies the metric into evaluate's cache
        nt = NTPrediction(task, model)
    compare(accelerator, nt, training, folder, [task, model, training])


if __name__ == "__main__":
    main()
