"""What the recipes on labelled text share: options, data, the training loop, what is written down.

A recipe brings a `Task`: its batches, how a model is built, what a loss is, how a model is measured.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import LoggerType, set_seed
from arguments import ATTENTION_HELP, Attention, option, require, require_at_least
from datasets import Dataset, DatasetDict, load_dataset
from reporting import Record, Run, environment, plot, print_table
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler
from transformers.utils.logging import disable_progress_bar

from hf_expressive.auxiliary import auxiliary_loss
from hf_expressive.hub import render_card
from hf_expressive.registry import MECHANISMS

Batch = Mapping[str, Tensor]


@dataclass
class DataOptions:
    _argument_group_name: ClassVar[str] = "the data"

    dataset: str | None = option(None, "data set of the Hub, or a folder that `datasets` loads")
    dataset_config: str | None = option(None, "its configuration, where it has several")
    dataset_revision: str | None = option(None, "its branch, tag or commit")
    train_split: str = option("train", "its split to train on")
    validation_split: str = option("validation", "its split to measure on")
    train_file: str | None = option(None, "CSV or JSON (lines) file to train on, for --dataset")
    validation_file: str | None = option(None, "file of the same kind to measure on")
    validation_share: float = option(
        0.1, "share of --train_file to measure on instead, where there is no --validation_file"
    )
    max_length: int = option(128, "tokens of a text; what is longer is cut")

    def __post_init__(self) -> None:
        require_at_least(self, 2, "max_length")
        require(
            (self.dataset is None) != (self.train_file is None),
            "give either --dataset or --train_file; "
            f"got --dataset {self.dataset} and --train_file {self.train_file}.",
        )
        require(
            self.validation_file is None or self.train_file is not None,
            "--validation_file goes with --train_file; for --dataset there is --validation_split.",
        )
        require(
            0 < self.validation_share < 1,
            f"--validation_share must be between 0 and 1, got {self.validation_share}.",
        )

    @property
    def name(self) -> str:
        """What the data set is called in table and card."""
        return self.dataset or Path(str(self.train_file)).stem


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
    steps: int = option(2000, "optimiser steps of a run")
    batch_size: int = option(64, "texts in a step, over all processes and accumulated batches")
    gradient_accumulation_steps: int = option(1, "batches that a step is put together from")
    learning_rate: float = option(5e-4, "of AdamW, at its highest")
    schedule: Literal["constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = option(
        "linear", "how the learning rate goes on after the warm-up"
    )
    warmup_steps: int = option(100, "steps in which the learning rate rises from 0")
    weight_decay: float = option(
        0.01, "of weight matrices; biases, norms and what a mechanism learns go without"
    )
    max_grad_norm: float = option(1.0, "longer gradients are shortened to this length")
    evaluate_every: int = option(200, "steps between two measurements")

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "steps", "batch_size", "gradient_accumulation_steps", "evaluate_every"
        )
        require_at_least(self, 0, "warmup_steps", "weight_decay")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            require(value > 0, f"--{name} must be positive, got {value}.")
        require(
            len(set(self.seeds)) == len(self.seeds) and min(self.seeds) >= 0,
            f"--seeds must be different numbers ≥ 0, got {' '.join(map(str, self.seeds))}.",
        )
        Attention.parse_all(self.attention)


def read_splits(options: DataOptions, columns: Sequence[str]) -> DatasetDict:
    """Splits `train` and `validation` with these columns alone.

    A column `de` is also found as `translation.de`, inside a column of dictionaries.

    Raises:
        ValueError: a file of another kind, a missing split or column, an empty split.
    """
    if options.train_file is None:
        loaded = load_dataset(
            options.dataset, options.dataset_config, revision=options.dataset_revision
        )
        names = {"train": options.train_split, "validation": options.validation_split}
        missing = sorted(set(names.values()) - set(loaded))
        require(
            not missing,
            f"{options.dataset} has no split {', '.join(missing)}; it has {', '.join(loaded)}.",
        )
        splits = {split: loaded[name] for split, name in names.items()}
    else:
        splits = {"train": read_file(options.train_file)}
        if options.validation_file is not None:
            splits["validation"] = read_file(options.validation_file)
        else:
            parts = splits["train"].train_test_split(options.validation_share, seed=0)
            splits = {"train": parts["train"], "validation": parts["test"]}
    return DatasetDict({split: _pick(part, columns) for split, part in splits.items()})


def read_file(path: str) -> Dataset:
    """A CSV or JSON file as a data set.

    Raises:
        ValueError: neither by its name, or a file that is not there.
    """
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json"}
    suffix = Path(path).suffix.lower()
    require(suffix in kinds, f"{path} must end in {', '.join(kinds)}.")
    require(Path(path).is_file(), f"{path} is no file.")
    return load_dataset(kinds[suffix], data_files=path, split="train")


def _pick(split: Dataset, columns: Sequence[str]) -> Dataset:
    found = split.flatten()
    for column in columns:
        nested = [name for name in found.column_names if name.endswith(f".{column}")]
        if column not in found.column_names and len(nested) == 1:
            found = found.rename_column(nested[0], column)
        require(
            column in found.column_names,
            f"the data has no column {column}; it has {', '.join(found.column_names)}.",
        )
    found = found.select_columns(list(columns))
    require(len(found) > 0, "a split of the data is empty.")
    return found


class Task(ABC):
    """What a recipe is about.

    Attributes:
        name: of the recipe.
        auto_class: loads a saved model.
        metric_key: the quantity of `measure` that counts.
        tokenizer: saved beside every model.
        splits: tokenised `train` and `validation`.
    """

    name: str
    auto_class: Any
    metric_key: str
    tokenizer: PreTrainedTokenizerBase
    splits: DatasetDict
    base_model: str | None = None

    @abstractmethod
    def build(self, attention: Attention) -> PreTrainedModel:
        """A model with this attention, with random weights or those of a checkpoint."""

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A padded batch."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each text, (batch,); training minimises their mean."""

    @abstractmethod
    def measure(
        self, accelerator: Accelerator, model: nn.Module, validation: Iterable[Batch]
    ) -> dict[str, float]:
        """Quantities of the validation split, `metric_key` among them, alike on every process."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The task in the terms of `reporting.Record`."""

    def loader(self, split: str, batch_size: int, steps: int | None = None) -> DataLoader[Any]:
        """Batches of a split, once in order, or `steps` of them in random order."""
        rows: Any = self.splits[split]
        sampler = None if steps is None else RandomSampler(rows, num_samples=steps * batch_size)
        return DataLoader(rows, batch_size=batch_size, sampler=sampler, collate_fn=self.collate)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices with decay, everything else without.

    Frequencies, noise and exponents of a mechanism have no neutral zero to decay to.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and ".mechanism." not in name
        (decayed if is_matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def train(
    accelerator: Accelerator,
    task: Task,
    training: TrainingOptions,
    attention: Attention,
    seed: int,
    folder: Path,
) -> Run:
    """Trains one model, measures it on the way and saves it with its tokenizer."""
    set_seed(seed)
    model: Any = task.build(attention)
    parts = training.gradient_accumulation_steps
    optimizer: Any = torch.optim.AdamW(
        parameter_groups(model, training.weight_decay), lr=training.learning_rate
    )
    scheduler = get_scheduler(
        training.schedule, optimizer, training.warmup_steps, num_training_steps=training.steps
    )
    model, optimizer, batches, validation = accelerator.prepare(
        model,
        optimizer,
        task.loader("train", training.batch_size // parts, training.steps * parts),
        task.loader("validation", training.batch_size),
    )
    title = f"{attention.text} seed {seed}"
    curve: dict[str, list[float]] = defaultdict(list)
    bar = tqdm(
        total=training.steps,
        desc=title,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )

    def note(step: int) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            values = task.measure(accelerator, model, validation)
        for key, value in {"step": step, **values}.items():
            curve[key].append(value)
        accelerator.log({f"{title}/{key}": value for key, value in values.items()}, step=step)
        bar.set_postfix({key: f"{value:.4f}" for key, value in values.items()})
        return values

    start = time.perf_counter()
    final = note(0)
    step = 0
    for batch in batches:
        model.train()
        with accelerator.accumulate(model):
            loss = task.losses(model, batch).mean()
            # The regulariser of a mechanism that has one belongs to the data set as a whole.
            accelerator.backward(loss + auxiliary_loss(model) / len(task.splits["train"]))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            scheduler.step()
            step += 1
            bar.update()
            if step % training.evaluate_every == 0 or step == training.steps:
                final = note(step)
    seconds = time.perf_counter() - start
    bar.close()

    where = folder / f"{attention.file_name}-seed{seed}"
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(
        where,
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        task.tokenizer.save_pretrained(where)
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
        folder=where.name,
    )


def reload(
    accelerator: Accelerator, task: Task, training: TrainingOptions, run: Run, folder: Path
) -> PreTrainedModel:
    """Loads a saved model as any user would, and measures it again.

    Raises:
        RuntimeError: the loaded model runs another attention, its tokenizer differs, or its metric.
    """
    where = folder / str(run.folder)
    model = task.auto_class.from_pretrained(where)
    loaded, trained = model.config._attn_implementation, run.attention["mechanism"]
    if loaded != trained:
        raise RuntimeError(f"{where} was trained with {trained} attention, but loads as {loaded}.")
    if AutoTokenizer.from_pretrained(where).get_vocab() != task.tokenizer.get_vocab():
        raise RuntimeError(f"{where} loads another vocabulary than it was trained with.")
    validation = accelerator.prepare(task.loader("validation", training.batch_size))
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    prepared.eval()
    with torch.no_grad():
        again = task.measure(accelerator, prepared, validation)[task.metric_key]
    before = run.final[task.metric_key]
    if again != before:
        raise RuntimeError(
            f"{where} had {task.metric_key} {before} when it was saved, but {again} when loaded "
            "again."
        )
    return accelerator.unwrap_model(prepared)


@dataclass
class OutputOptions:
    _argument_group_name: ClassVar[str] = "output"

    output_dir: str | None = option(None, "folder for results; without it outputs/<recipe>")
    overwrite: bool = option(False, "replace the results that the output folder already holds")
    report_to: str = option("none", "tracker of Accelerate (tensorboard, wandb, …), all, or none")

    def __post_init__(self) -> None:
        known = ["none", *(kind.value for kind in LoggerType)]
        require(
            self.report_to in known,
            f"--report_to must be one of {', '.join(known)}; got {self.report_to!r}.",
        )


def start(name: str, training: TrainingOptions, output: OutputOptions) -> tuple[Accelerator, Path]:
    """The accelerator and the output folder; ends the program if results would be lost."""
    disable_progress_bar()  # Transformers' bars for files of a few kilobytes
    folder = Path(output.output_dir or f"outputs/{name}")
    if (folder / "results.json").exists() and not output.overwrite:
        sys.exit(
            f"error: {folder / 'results.json'} exists; choose another --output_dir, or pass "
            "--overwrite."
        )
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
    return accelerator, folder


def compare(
    accelerator: Accelerator,
    task: Task,
    training: TrainingOptions,
    folder: Path,
    options: Sequence[Any],
) -> None:
    """Every kind of attention with every seed: trains, records, shows, loads again, writes cards.

    Args:
        options: dataclasses whose fields are the record's settings.
    """
    settings = {key: value for part in options for key, value in asdict(part).items()}
    # Trackers take no lists.
    accelerator.init_trackers(task.name, {key: str(value) for key, value in settings.items()})
    runs = [
        train(accelerator, task, training, attention, seed, folder)
        for seed in training.seeds
        for attention in Attention.parse_all(training.attention)
    ]
    record = Record(
        recipe=task.name,
        task=task.describe(),
        settings=settings,
        runs=runs,
        environment=environment(accelerator),
    )
    results, picture = folder / "results.json", folder / f"{task.metric_key}.png"
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    if accelerator.is_main_process:
        record.save(results)
        plot(record, picture)
        print_table(record, console)
    for run in runs:
        loaded = reload(accelerator, task, training, run, folder)
        where = folder / str(run.folder)
        value = f"{task.metric_key} {run.final[task.metric_key]:.4f}"
        console.print(f"{where}: loaded again, {value} as before")
        if run.attention["mechanism"] in MECHANISMS and accelerator.is_main_process:
            card = render_card(
                loaded,
                results=record.to_dict(),
                seed=run.seed,
                name=f"{task.name}-{run.folder}",
                base_model=task.base_model,
                datasets=settings.get("dataset"),
            )
            card.save(where / "README.md")
    console.print(f"{results} and {picture} written")
    accelerator.end_training()
