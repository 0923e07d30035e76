"""Which kind of attention learns text best, at equal cost: many runs of pretrain.py, one comparison.

    python recipes/study.py --per_device 3 -- --train_files 'corpus/**/*.py' --steps 4400
    python recipes/study.py --settings softmax=llama/sdpa mine=qwen3/expressive:power=2,scale=learned

What stands behind `--` are options of pretrain.py for every run. Each setting is trained once for each
seed, seed by seed, as many runs at a time as there are devices times --per_device. A finished run is
not repeated and an interrupted one goes on from its checkpoint, so the same command can be given
again. The output folder gets results.json, loss.png and runs/; results.json holds what there is so
far, from the first measurement on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from arguments import Attention
from matplotlib.figure import Figure
from reporting import COLOURS, STYLES, Record, Run, Spread
from rich.console import Console
from rich.table import Table

RECIPE = Path(__file__).parent / "pretrain.py"

#: name=architecture/attention. qwen3 is llama with query/key normalisation.
SETTINGS = (
    "softmax=llama/sdpa",
    "softmax, q/k norm=qwen3/sdpa",
    "EA of the paper=llama/expressive:scale=1",
    "EA, gain, q/k norm=qwen3/expressive:scale=learned",
    "EA², gain, q/k norm=qwen3/expressive:scale=learned,power=2",
    "EA², half the heads=qwen3/expressive:scale=learned,power=2,softmax_heads=4",
    "EA², half the layers=qwen3/expressive:scale=learned,power=2,softmax_layers=[0,2,4]",
    "EA³, gain, sink, q/k norm=qwen3/expressive:scale=learned,power=3,sink=true,gain=0.3",
    "EA², sink, half the heads="
    "qwen3/expressive:scale=learned,power=2,sink=true,gain=0.3,softmax_heads=4",
    "EA³, sink, half the heads="
    "qwen3/expressive:scale=learned,power=3,sink=true,gain=0.3,softmax_heads=4",
    "IKA direct=llama/implicit_kernel",
    "IKA direct, near softmax=llama/implicit_kernel:init=orthogonal",
)


@dataclass(frozen=True)
class Setting:
    """One line of the comparison."""

    name: str
    architecture: str
    attention: str

    @classmethod
    def parse(cls, text: str) -> Setting:
        name, _, rest = text.partition("=")
        architecture, slash, attention = rest.partition("/")
        if not slash:
            raise argparse.ArgumentTypeError(f"expected name=architecture/attention, got {text!r}.")
        try:
            Attention.parse(attention)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return cls(name.strip(), architecture, attention)


@dataclass(frozen=True)
class Job:
    setting: Setting
    seed: int
    folder: Path

    def command(self, options: Sequence[str]) -> list[str]:
        return [
            *(sys.executable, str(RECIPE), "--no_save_model", *options),
            *("--resume", "--seed", str(self.seed)),
            *("--architecture", self.setting.architecture, "--attention", self.setting.attention),
            *("--output_dir", str(self.folder)),
        ]

    def found(self) -> Record | None:
        """The record of its run, called by the setting; of an unfinished one what there is."""
        settings, results = self.folder / "settings.json", self.folder / "results.json"
        curve = self.folder / "curve.json"
        if results.exists():
            record = Record.load(results)
            return replace(record, runs=[replace(record.runs[0], variant=self.setting.name)])
        if not curve.exists():
            return None
        known = json.loads(curve.read_text(encoding="utf-8"))
        given = json.loads(settings.read_text(encoding="utf-8"))
        run = Run(
            variant=self.setting.name,
            attention=Attention.parse(self.setting.attention).section,
            seed=self.seed,
            parameters=0,
            seconds=0.0,
            curve=known,
            final={key: values[-1] for key, values in known.items() if key != "step"},
        )
        return Record(recipe="pretrain", task={}, runs=[run], **given)


def run_all(
    jobs: Sequence[Job],
    options: Sequence[str],
    devices: Sequence[str],
    per_device: int,
    deadline: float,
    collect: Any,
) -> None:
    """Starts jobs wherever a place is free; ends what still runs at the deadline."""
    places = [device for _ in range(per_device) for device in devices]
    running: dict[subprocess.Popen[bytes], tuple[Job, str]] = {}
    waiting = [job for job in jobs if not (job.folder / "results.json").exists()]
    stopping = news = False
    try:
        while running or (waiting and not stopping):
            stopping = stopping or time.monotonic() > deadline
            while waiting and places and not stopping:
                job, place = waiting.pop(0), places.pop(0)
                running[start(job, options, place)] = (job, place)
            if stopping:
                for process in running:
                    process.terminate()
            if news:  # only now: a device must not wait for a picture
                collect()
            time.sleep(0.2)
            ended = [process for process in running if process.poll() is not None]
            news = bool(ended)
            for process in ended:
                job, place = running.pop(process)
                places.append(place)
                how = "finished" if process.returncode == 0 else f"ended with {process.returncode}"
                print(f"{job.folder.name} {how}", flush=True)
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)


def start(job: Job, options: Sequence[str], device: str) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    place = {"CUDA_VISIBLE_DEVICES": device} if device != "cpu" else {"ACCELERATE_USE_CPU": "true"}
    with (job.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            job.command(options),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "4", **os.environ, **place},
        )


def collect(jobs: Sequence[Job], settings: Sequence[Setting], folder: Path) -> Record | None:
    """Writes results.json and loss.png of what there is."""
    found = [one for job in jobs if (one := job.found()) is not None]
    if not found:
        return None
    own = {"seed", "architecture", "attention"}
    shared = {key: value for key, value in found[0].settings.items() if key not in own}
    finished = [one.task for one in found if one.task]
    record = Record(
        recipe="study",
        task={
            "type": "text-generation",
            "name": f"language model, {shared['steps']} steps",
            "metric": {
                "type": "loss",
                "key": "loss",
                "name": f"validation loss (nats a {'token' if shared['tokenizer'] else 'byte'})",
            },
            **({"dataset": finished[0]["dataset"]} if finished else {}),
        },
        settings={
            **shared,
            "compared": {s.name: f"{s.architecture}/{s.attention}" for s in settings},
        },
        runs=[run for one in found for run in one.runs],
        environment=found[0].environment,
    )
    record = replace(record, task={**record.task, "comparison": comparison(record)})
    record.save(folder / "results.json")
    draw(record).savefig(folder / "loss.png")
    return record


def mean_at(record: Record, name: str, step: int) -> list[float]:
    """Losses of a setting's runs at a step that they were measured at."""
    return [
        run.curve["loss"][list(run.curve["step"]).index(step)]
        for run in record.runs_of(name)
        if step in run.curve["step"]
    ]


def comparison(record: Record) -> list[dict[str, Any]]:
    """Of each setting: its loss at the last step of all its runs, and the best softmax's there."""
    compared = record.settings["compared"]
    softmax = [name for name in record.variants if compared[name].endswith("/sdpa")]
    rows = []
    for name in record.variants:
        step = min(run.curve["step"][-1] for run in record.runs_of(name))
        losses = mean_at(record, name, step)
        others = [found for other in softmax if (found := mean_at(record, other, step))]
        row = {"setting": name, "attention": compared[name], "step": step, "losses": losses}
        if others:
            row["best_softmax"] = min(map(statistics.fmean, others))
        rows.append(row)
    return rows


def in_order(record: Record) -> list[dict[str, Any]]:
    """The comparison, best first: by the difference to softmax, since steps may differ."""

    def rank(row: dict[str, Any]) -> float:
        return statistics.fmean(row["losses"]) - row.get("best_softmax", 0.0)

    return sorted(record.task["comparison"], key=rank)


def draw(record: Record) -> Figure:
    """Mean curves, the best below; what is far above the best is named, but out of sight."""
    rows = in_order(record)
    figure = Figure(figsize=(9.6, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    best = min(statistics.fmean(row["losses"]) for row in rows)
    for number, row in enumerate(rows):
        runs = record.runs_of(row["setting"])
        steps = [step for step in runs[0].curve["step"][1:] if step <= row["step"]]
        lines = [run.curve["loss"][1 : len(steps) + 1] for run in runs]
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS)]
        label = f"{row['setting']}: {statistics.fmean(row['losses']):.3f} at {row['step']}"
        mean = [statistics.fmean(values) for values in zip(*lines, strict=True)]
        axes.plot(steps, mean, color=colour, linestyle=style, linewidth=2, label=label)
        for line in lines:
            axes.plot(steps, line, color=colour, linestyle=style, linewidth=0.6, alpha=0.5)
    axes.set(xlabel="training step", ylabel=record.task["metric"]["name"])
    axes.set_xlim(0, None)
    axes.set_ylim(best - 0.02, best + 0.45)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    figure.legend(loc="outside right center", frameon=False, handlelength=3, fontsize=9)
    return figure


def print_comparison(record: Record, console: Console) -> None:
    """Loss of each setting, and how far it is from the best softmax at the same step."""
    table = Table(title=record.task["metric"]["name"], title_style="bold")
    for column in ("setting", "attention", "step", "mean ± deviation", "to softmax", "seeds"):
        left = column in ("setting", "attention")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in in_order(record):
        spread = Spread.of(row["losses"])
        far = f"{spread.mean - row['best_softmax']:+.4f}" if "best_softmax" in row else ""
        cells = [row["setting"], row["attention"], str(row["step"]), str(spread), far]
        table.add_row(*cells, str(len(spread.values)))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python recipes/study.py [options] [-- options of pretrain.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--settings", nargs="+", type=Setting.parse, metavar="NAME=ARCHITECTURE/ATTENTION",
        default=[Setting.parse(text) for text in SETTINGS], help="what to compare",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--devices", nargs="+", help="numbers of GPUs, or cpu; default: every GPU there is"
    )
    parser.add_argument("--per_device", type=int, default=1, help="runs at a time on each")
    parser.add_argument("--minutes", type=float, help="stop after this time (default: never)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--show", type=Path, help="only the table and picture of this results.json")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    given, options = parser.parse_args(words[:split]), words[split + 1 :]
    if given.show is not None:
        record = Record.load(given.show)
        draw(record).savefig(given.show.with_suffix(".png"))
        print_comparison(record, Console(soft_wrap=True))
        return
    devices = given.devices or [str(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    jobs = [
        Job(setting, seed, given.output_dir / "runs" / f"{number:02}-seed{seed}")
        for seed in given.seeds
        for number, setting in enumerate(given.settings)
    ]
    given.output_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + (given.minutes * 60 if given.minutes else float("inf"))

    def gather() -> Record | None:
        return collect(jobs, given.settings, given.output_dir)

    run_all(jobs, options, devices, given.per_device, deadline, gather)
    record = gather()
    if record is None:
        sys.exit(f"error: no run came to its first measurement; see log.txt in {jobs[0].folder}.")
    print_comparison(record, Console(soft_wrap=True))


if __name__ == "__main__":
    main()
