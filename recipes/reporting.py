"""What every recipe writes down: the results record, the table on the terminal, the picture.

A record is one JSON file from which table, picture and model card can be made again:

    python recipes/reporting.py outputs/nt_prediction/results.json --plot accuracy.png \\
        --model outputs/nt_prediction/expressive-seed0 --seed 0 --card card.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import hf_expressive
from hf_expressive.hub import load, render_card

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "huggingface_hub",
    "numpy",
    "peft",
    "triton",
)

# Okabe and Ito's colours, told apart with every kind of colour vision; the line styles repeat the
# distinction for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("--", "-", "-.", ":")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        variant: name of what is compared, for example `"sdpa"` or `"expressive"`.
        attention: the mechanism and its options, as in the model's `config.json`; for attention of
            Transformers itself `{"mechanism": <its name>}`.
        seed: of data, initial weights and order.
        parameters: number of parameters of the model.
        seconds: training time, evaluation included.
        curve: one list for each quantity, among them `"step"`, all of one length.
        final: the last value of each measured quantity.
        folder: where the model was saved, relative to the record.
    """

    variant: str
    attention: Mapping[str, Any]
    seed: int
    parameters: int
    seconds: float
    curve: Mapping[str, Sequence[float]]
    final: Mapping[str, float]
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and spread over runs; the standard deviation (n − 1) needs two of them."""

    mean: float
    deviation: float | None
    low: float
    high: float
    values: Sequence[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(
            mean=statistics.fmean(values),
            deviation=deviation,
            low=min(values),
            high=max(values),
            values=list(values),
        )

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"{self.mean:.4f}{spread}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything a recipe run leaves behind; JSON types only.

    Attributes:
        recipe: name of the script.
        task: `type` (a pipeline tag of the Hub), `name`, `description`; for the model card
            `training`, a sentence on objective and optimiser, and `limits`, sentences; `dataset` with
            `name`, `type` (its Hub name, or `"generated"`), `description`, and where they exist
            `split` and `args`; `metric` with `type`, `name`, `key` in the curves, `description`, and
            where they exist `range` and `chance` (the value of a blind guess).
        settings: the resolved options.
        runs: the training runs.
        environment: see `environment`.
        card: for the model card of one of the models, what the rest does not tell: `architecture`, its
            class; where they exist the `variant` and `seed` of its run, `name`, `model_id`,
            `base_model`, `base_model_relation`, `datasets`, `language`, `license`, `tags`.
    """

    recipe: str
    task: Mapping[str, Any]
    settings: Mapping[str, Any]
    runs: Sequence[Run]
    environment: Mapping[str, Any]
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """Names of what was compared, in the order of the runs."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    def runs_of(self, variant: str) -> list[Run]:
        return [run for run in self.runs if run.variant == variant]

    def spread(self, variant: str) -> Spread:
        """Final value of the task's metric over the runs of a variant."""
        key = self.task["metric"]["key"]
        return Spread.of([run.final[key] for run in self.runs_of(variant)])

    def to_dict(self) -> dict[str, Any]:
        summary = {
            variant: {
                **asdict(self.spread(variant)),
                "seeds": [run.seed for run in self.runs_of(variant)],
            }
            for variant in self.variants
        }
        return {**asdict(self), "summary": summary}

    def save(self, path: Path) -> None:
        """Writes JSON beside `path` and renames, so that a reader never finds half a file."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        # Lists of numbers and words on one line. Line breaks occur between values only.
        text = re.sub(r"\[\n[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("summary")
        runs = [Run(**run) for run in content.pop("runs")]
        return cls(runs=runs, **content)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files that only their owner may read.
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Date, versions, hardware and commit; what cannot be found out is left out."""
    versions = {"python": platform.python_version(), "hf_expressive": hf_expressive.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    if accelerator.device.type == "cuda":
        hardware["accelerator"] = torch.cuda.get_device_name(accelerator.device)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "hardware": {name: value for name, value in hardware.items() if value},
    }
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        found["commit"] = {"id": commit, "modified": bool(_git("status", "--porcelain"))}
    return found


def _processor() -> str | None:
    """Model name of the processor."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout of this file; `None` without git, a checkout or a commit."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def print_table(record: Record, console: Console | None = None) -> None:
    """The comparison: mean and spread of the metric for each variant, and each run's value."""
    metric = record.task["metric"]
    table = Table(title=f"{record.task['name']}: {metric['name']}", title_style="bold")
    table.add_column("attention", overflow="fold")
    table.add_column("mean ± deviation", justify="right", no_wrap=True)
    table.add_column("seed: value", justify="right")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("a run", justify="right", no_wrap=True)
    for variant in record.variants:
        runs, spread = record.runs_of(variant), record.spread(variant)
        values = zip(runs, spread.values, strict=True)
        table.add_row(
            variant,
            str(spread),
            "  ".join(f"{run.seed}: {value:.4f}" for run, value in values),
            f"{runs[0].parameters:,}",
            f"{statistics.fmean(run.seconds for run in runs):.0f} s",
        )
    (console or Console()).print(table)


def draw(record: Record) -> Figure:
    """The metric against the training step: a thin line a run, a thick one for each variant's mean.

    Runs of one variant must share their steps.
    """
    metric = record.task["metric"]
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, variant in enumerate(record.variants):
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
        runs = record.runs_of(variant)
        steps = runs[0].curve["step"]
        values = [run.curve[metric["key"]] for run in runs]
        for line in values:
            axes.plot(steps, line, color=colour, linestyle=style, linewidth=0.8, alpha=0.45)
        mean = [statistics.fmean(column) for column in zip(*values, strict=True)]
        axes.plot(steps, mean, color=colour, linestyle=style, linewidth=2.4, label=variant)
    if "chance" in metric:
        axes.axhline(
            metric["chance"],
            color="0.55",
            linewidth=0.8,
            linestyle=(0, (1, 3)),
            label="blind guess",
        )
    axes.set(xlabel="training step", ylabel=metric["name"], title=record.task["name"])
    axes.set_xlim(0, max(run.curve["step"][-1] for run in record.runs))
    if "range" in metric:
        low, high = metric["range"]
        axes.set_ylim(low, high + 0.03 * (high - low))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="best", handlelength=3)
    return figure


def plot(record: Record, path: Path) -> None:
    """Writes the picture of `draw`; the ending of `path` tells the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(record).savefig(path)


def main() -> None:
    """Makes table, picture and model card of a record again, without training."""
    parser = argparse.ArgumentParser(
        usage="python recipes/reporting.py results.json [options]", description=main.__doc__
    )
    parser.add_argument("record", type=Path, help="results.json of a recipe")
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--card", type=Path, help="model card to write; needs --model")
    parser.add_argument("--model", type=Path, help="folder of the trained model")
    parser.add_argument("--seed", type=int, help="which of the runs the model is")
    parser.add_argument("--name", help="name of the model in the card")
    parser.add_argument("--model-id", help="what the card's example loads, if not its own folder")
    parser.add_argument("--license", help="identifier of the model's licence on the Hub")
    given = parser.parse_args()
    if (given.card is None) != (given.model is None):
        parser.error("--card and --model go together.")
    record = Record.load(given.record)
    print_table(record)
    if given.plot is not None:
        plot(record, given.plot)
    if given.card is not None:
        disable_progress_bar()  # Transformers' own, for loading
        model = load(given.model)
        card = render_card(
            model,
            results=record.to_dict(),
            seed=given.seed,
            name=given.name,
            model_id=given.model_id,
            license=given.license,
        )
        write_text(given.card, f"{card}")


if __name__ == "__main__":
    main()
