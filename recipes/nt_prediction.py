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

import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import evaluate
import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from arguments import ATTENTION_HELP, Attention, option, parse, require, require_at_least
from datasets import Dataset, DatasetDict, Features, List, Value
from numpy.typing import NDArray
from reporting import Record, Run, environment, plot, print_table
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from hf_expressive.auxiliary import auxiliary_loss
from hf_expressive.hub import render_card
from hf_expressive.registry import MECHANISMS

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
class TrainingOptions:
    _argument_group_name: ClassVar[str] = "training"

    attention: list[str] = field(
        default_factory=lambda: ["sdpa", "expressive"], metadata={"help": ATTENTION_HELP}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "one run of each kind of attention for each of these"},
    )
    steps: int = option(1000, "optimiser steps of a run")
    batch_size: int = option(256, "sequences in a step, over all processes and accumulated batches")
    gradient_accumulation_steps: int = option(1, "batches that a step is put together from")
    learning_rate: float = option(2e-3, "of Adam, constant")
    evaluate_every: int = option(25, "steps between two measurements")

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "steps", "batch_size", "gradient_accumulation_steps", "evaluate_every"
        )
        require(
            self.learning_rate > 0, f"--learning_rate must be positive, got {self.learning_rate}."
        )
        require(
            len(set(self.seeds)) == len(self.seeds) and min(self.seeds) >= 0,
            f"--seeds must be different numbers ≥ 0, got {' '.join(map(str, self.seeds))}.",
        )
        Attention.parse_all(self.attention)


@dataclass
class OutputOptions:
    _argument_group_name: ClassVar[str] = "output"

    output_dir: str = option("outputs/nt_prediction", "folder for results, picture and models")
    overwrite: bool = option(False, "replace the results that the output folder already holds")
    report_to: str = option(
        "none", "tracker of Accelerate (tensorboard, wandb, …), all that are installed, or none"
    )

    def __post_init__(self) -> None:
        installed = [kind.value for kind in get_available_trackers()]
        require(
            self.report_to in ("none", "all", *installed),
            "--report_to must be none, all or an installed tracker "
            f"({', '.join(installed) or 'there is none'}); got {self.report_to!r}.",
        )


@dataclass(frozen=True)
class Experiment:
    """What all runs share."""

    accelerator: Accelerator
    metric: evaluate.EvaluationModule
    folder: Path
    task: TaskOptions
    model: ModelOptions
    training: TrainingOptions


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


def loader(split: Dataset, batch_size: int, steps: int | None = None) -> DataLoader[Tensor]:
    """Batches (batch, length): the split once in order, or `steps` batches in random order.

    The random order runs through the whole split before a sequence comes again.
    """
    # One tensor, since picking rows out of a table would take longer than a training step.
    rows: Any = split[:]["input_ids"]
    sampler = None if steps is None else RandomSampler(rows, num_samples=steps * batch_size)
    return DataLoader(rows, batch_size=batch_size, sampler=sampler)


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


@torch.no_grad()
def measure(
    experiment: Experiment, model: nn.Module, validation: DataLoader[Tensor]
) -> dict[str, float]:
    """`loss` and `accuracy` on the determined symbols of a split, the same on every process."""
    delay, metric = experiment.task.delay, experiment.metric
    losses = []
    model.eval()
    for rows in validation:
        logits = model(input_ids=rows, use_cache=False).logits
        references = rows[:, 1:].clone()
        references[:, : delay - 1] = IGNORED
        loss, predicted, true = experiment.accelerator.gather_for_metrics(
            (determined_loss(logits, rows, delay), logits[:, :-1].argmax(-1), references)
        )
        losses.append(loss)
        metric.add_batch(predictions=predicted.cpu().numpy(), references=true.cpu().numpy())
    accuracy = metric.compute(ignore_index=IGNORED)["accuracy"]
    return {"loss": torch.cat(losses).mean().item(), "accuracy": accuracy}


# ---- runs ----------------------------------------------------------------------------------------


def train(experiment: Experiment, data: DatasetDict, attention: Attention, seed: int) -> Run:
    """Trains one model, measures it on the way and saves it."""
    accelerator, training = experiment.accelerator, experiment.training
    delay = experiment.task.delay
    set_seed(seed)
    model: Any = attention.causal_lm(model_config(experiment.model, experiment.task))
    parts = training.gradient_accumulation_steps
    model, optimizer, batches, validation = accelerator.prepare(
        model,
        torch.optim.Adam(model.parameters(), lr=training.learning_rate),
        loader(data["train"], training.batch_size // parts, training.steps * parts),
        loader(data["validation"], training.batch_size),
    )

    title = f"{attention.text} seed {seed}"
    curve: dict[str, list[float]] = defaultdict(list)
    bar = tqdm(
        total=training.steps,
        desc=title,
        unit="step",
        dynamic_ncols=True,
        mininterval=1.0,
        disable=not accelerator.is_main_process,
    )

    def note(step: int) -> dict[str, float]:
        values = measure(experiment, model, validation)
        for key, value in {"step": step, **values}.items():
            curve[key].append(value)
        accelerator.log({f"{title}/{key}": value for key, value in values.items()}, step=step)
        bar.set_postfix({key: f"{value:.4f}" for key, value in values.items()}, refresh=False)
        return values

    start = time.perf_counter()
    final = note(0)
    step = 0
    for rows in batches:
        model.train()
        with accelerator.accumulate(model):
            logits = model(input_ids=rows, use_cache=False).logits
            # The regulariser of a mechanism that has one belongs to the data set as a whole.
            regulariser = auxiliary_loss(model) / experiment.task.train_size
            accelerator.backward(determined_loss(logits, rows, delay).mean() + regulariser)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            bar.update()
            if step % training.evaluate_every == 0 or step == training.steps:
                final = note(step)
    seconds = time.perf_counter() - start
    bar.close()

    folder = experiment.folder / f"{attention.file_name}-seed{seed}"
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(
        folder,
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    parameters = plain.num_parameters()
    accelerator.free_memory(model, optimizer, batches, validation)
    accelerator.wait_for_everyone()
    return Run(
        variant=attention.text,
        attention=attention.section,
        seed=seed,
        parameters=parameters,
        seconds=seconds,
        curve=dict(curve),
        final=final,
        folder=folder.name,
    )


def reload(experiment: Experiment, run: Run) -> PreTrainedModel:
    """Loads a saved model as any user would, and measures it again.

    Raises:
        RuntimeError: the loaded model runs another attention, or its accuracy differs.
    """
    accelerator = experiment.accelerator
    folder = experiment.folder / str(run.folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded, trained = model.config._attn_implementation, run.attention["mechanism"]
    if loaded != trained:
        raise RuntimeError(f"{folder} was trained with {trained} attention, but loads as {loaded}.")
    split = nt_dataset(experiment.task, run.seed)["validation"]
    validation = accelerator.prepare(loader(split, experiment.training.batch_size))
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    again = measure(experiment, prepared, validation)["accuracy"]
    if again != run.final["accuracy"]:
        raise RuntimeError(
            f"{folder} had accuracy {run.final['accuracy']} when it was saved, but {again} when "
            "loaded again."
        )
    return accelerator.unwrap_model(prepared)


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


def about(folder: Path, task: TaskOptions, model: ModelOptions, runs: list[Run]) -> dict[str, Any]:
    """What the card of the first model with a mechanism tells beyond the record."""
    for run in runs:
        if run.attention["mechanism"] in MECHANISMS:
            kind = str(run.folder).removesuffix(f"-seed{run.seed}")
            return {
                "architecture": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.architecture],
                "variant": run.variant,
                "seed": run.seed,
                "name": f"nt-{task.basis}-{task.delay}-{kind}",
                "model_id": (folder / str(run.folder)).as_posix(),
            }
    return {}


def main() -> None:
    task, model, training, output = parse(
        [TaskOptions, ModelOptions, TrainingOptions, OutputOptions], "nt_prediction.py", __doc__
    )
    disable_progress_bar()  # Transformers' bars for files of a few kilobytes
    folder = Path(output.output_dir)
    results, picture = folder / "results.json", folder / "accuracy.png"
    if results.exists() and not output.overwrite:
        sys.exit(f"error: {results} exists; choose another --output_dir, or pass --overwrite.")
    accelerator = Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        # A batch is divided among the processes, so that their number does not change the result.
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
        log_with=None if output.report_to == "none" else output.report_to,
        project_dir=folder,
    )
    parts = accelerator.num_processes * training.gradient_accumulation_steps
    if training.batch_size % parts:
        sys.exit(
            f"error: --batch_size must be a multiple of {parts}, processes × accumulated batches; "
            f"got {training.batch_size}."
        )
    settings = {
        key: value for options in (task, model, training) for key, value in asdict(options).items()
    }
    # Trackers take no lists.
    accelerator.init_trackers("nt_prediction", {key: str(value) for key, value in settings.items()})
    with accelerator.main_process_first():  # one process copies the metric into evaluate's cache
        metric = evaluate.load(METRIC, keep_in_memory=True)
    experiment = Experiment(accelerator, metric, folder, task, model, training)

    runs = []
    for seed in training.seeds:
        data = nt_dataset(task, seed)
        for attention in Attention.parse_all(training.attention):
            runs.append(train(experiment, data, attention, seed))
    record = Record(
        recipe="nt_prediction",
        task=describe(task),
        settings=settings,
        runs=runs,
        environment=environment(accelerator),
        card=about(folder, task, model, runs),
    )
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    if accelerator.is_main_process:
        record.save(results)
        plot(record, picture)
        print_table(record, console)
    for run in runs:
        loaded = reload(experiment, run)
        where = folder / str(run.folder)
        console.print(f"{where}: loaded again, accuracy {run.final['accuracy']:.4f} as before")
        if run.attention["mechanism"] in MECHANISMS and accelerator.is_main_process:
            name = f"nt-{task.basis}-{task.delay}-{run.folder}"
            card = render_card(loaded, results=record.to_dict(), seed=run.seed, name=name)
            card.save(where / "README.md")
    console.print(f"{results} and {picture} written")
    accelerator.end_training()


if __name__ == "__main__":
    main()
