"""What the recipes on labelled text share: options, data, the training loop, what is written down.

A recipe brings a `Task`: its batches, how a model is built, what a loss is, how a model is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import loop
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import ATTENTION_HELP, Attention, option, require, require_at_least
from datasets import Dataset, DatasetDict, load_dataset
from loop import Batch, Loop, OutputOptions, adamw, save_trained, start
from reporting import Record, Run, environment, plot, print_table
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_expressive.hub import class_of, render_card
from hf_expressive.registry import MECHANISMS

__all__ = [
    "Batch",
    "DataOptions",
    "OutputOptions",
    "Task",
    "TrainingOptions",
    "compare",
    "read_file",
    "read_splits",
    "start",
]


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
class TrainingOptions(loop.TrainingOptions):
    attention: list[str] = field(
        default_factory=lambda: ["sdpa", "expressive"], metadata={"help": ATTENTION_HELP}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "one run of each kind of attention for each of these"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
        title: begins the names of its models; the recipe's name where a task says nothing else.
        auto_class: loads a saved model.
        metric_key: the quantity of `measure` that counts.
        tokenizer: saved beside every model, where there is one.
        splits: tokenised `train` and `validation`.
    """

    name: str
    auto_class: Any
    metric_key: str
    tokenizer: PreTrainedTokenizerBase | None = None
    splits: DatasetDict
    base_model: str | None = None

    @property
    def title(self) -> str:
        return self.name

    def draw(self, seed: int) -> None:  # noqa: B027  (most tasks have nothing to do here)
        """Makes ready what depends on the seed of a run."""

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
    task.draw(seed)
    model: Any = task.build(attention)
    optimizer, schedule = adamw(accelerator, model, training)
    parts = training.gradient_accumulation_steps
    model, optimizer, batches, validation = accelerator.prepare(
        model,
        optimizer,
        task.loader("train", training.batch_size // parts, training.steps * parts),
        task.loader("validation", training.batch_size),
    )
    run = Loop(
        accelerator,
        model,
        optimizer,
        schedule,
        loss=lambda module, batch: task.losses(module, batch).mean(),
        measure=lambda module: task.measure(accelerator, module, validation),
        training=training,
        title=f"{attention.text} seed {seed}",
        samples=len(task.splits["train"]),
    )
    final = run.run(batches)
    where = folder / f"{attention.file_name}-seed{seed}"
    parameters = save_trained(accelerator, model, where, task.tokenizer)
    accelerator.free_memory(model, optimizer, batches, validation)
    accelerator.wait_for_everyone()
    return Run(
        variant=attention.text,
        attention=attention.section,
        seed=seed,
        parameters=parameters,
        seconds=run.seconds,
        curve=dict(run.curve),
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
    given = task.tokenizer
    if given and AutoTokenizer.from_pretrained(where).get_vocab() != given.get_vocab():
        raise RuntimeError(f"{where} loads another vocabulary than it was trained with.")
    task.draw(run.seed)
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


def about(task: Task, runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """What the card of the first model with a mechanism tells beyond the record."""
    for run in runs:
        if run.attention["mechanism"] in MECHANISMS:
            where = folder / str(run.folder)
            return {
                "architecture": class_of(AutoConfig.from_pretrained(where)).__name__,
                "variant": run.variant,
                "seed": run.seed,
                "name": f"{task.title}-{str(run.folder).removesuffix(f'-seed{run.seed}')}",
                "model_id": where.as_posix(),
            }
    return {}


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
        card=about(task, runs, folder),
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
                name=f"{task.title}-{run.folder}",
                base_model=task.base_model,
                datasets=settings.get("dataset"),
            )
            card.save(where / "README.md")
    console.print(f"{results} and {picture} written")
    accelerator.end_training()
