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
from reporting import Record, Run, plot
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
    "IKA direct=llama/implicit_kernel",
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

    def found(self) -> tuple[Run, dict[str, Any], dict[str, Any]] | None:
        """The run with settings and environment; an unfinished run has no folder."""
        settings, results = self.folder / "settings.json", self.folder / "results.json"
        curve = self.folder / "curve.json"
        if results.exists():
            record = Record.load(results)
            run = replace(record.runs[0], variant=self.setting.name)
            return run, dict(record.settings), dict(record.environment)
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
        return run, given["settings"], given["environment"]


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
    stopping = False
    try:
        while running or (waiting and not stopping):
            stopping = stopping or time.monotonic() > deadline
            while waiting and places and not stopping:
                job, place = waiting.pop(0), places.pop(0)
                running[start(job, options, place)] = (job, place)
            if stopping:
                for process in running:
                    process.terminate()
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job, place = running.pop(process)
                places.append(place)
                state = (
                    "finished" if process.returncode == 0 else f"ended with {process.returncode}"
                )
                print(f"{job.folder.name} {state}", flush=True)
                collect()
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
    runs, run_settings, environments = zip(*found, strict=True)
    own = {"seed", "architecture", "attention"}
    shared = {key: value for key, value in run_settings[0].items() if key not in own}
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
        },
        settings={
            **shared,
            "compared": {s.name: f"{s.architecture}/{s.attention}" for s in settings},
        },
        runs=runs,
        environment=environments[0],
    )
    record.save(folder / "results.json")
    plot(comparable(record), folder / "loss.png")
    return record


def comparable(record: Record) -> Record:
    """The runs without their first measurement, as far as all of a variant have come."""
    runs = []
    for run in record.runs:
        least = min(len(other.curve["step"]) for other in record.runs_of(run.variant))
        first = 1 if least > 2 else 0
        curve = {key: values[first:least] for key, values in run.curve.items()}
        runs.append(replace(run, curve=curve))
    return replace(record, runs=runs)


def print_comparison(record: Record, console: Console) -> None:
    """Final loss of each setting, and how far it is from the best softmax."""
    last = record.settings["steps"]
    finals = {
        name: [run.final["loss"] for run in record.runs_of(name) if run.curve["step"][-1] == last]
        for name in record.variants
    }
    softmax = [
        statistics.fmean(values)
        for name, values in finals.items()
        if values and record.settings["compared"][name].endswith("/sdpa")
    ]
    table = Table(title=f"{record.task['metric']['name']} after {last} steps", title_style="bold")
    for column in ("setting", "attention", "mean ± deviation", "to the best softmax", "seeds"):
        left = column in ("setting", "attention")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    ordered = sorted((n for n in finals if finals[n]), key=lambda n: statistics.fmean(finals[n]))
    for name in ordered:
        values = finals[name]
        mean = statistics.fmean(values)
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        table.add_row(
            name,
            record.settings["compared"][name],
            f"{mean:.4f}{spread}",
            f"{mean - min(softmax):+.4f}" if softmax else "",
            str(len(values)),
        )
    console.print(table)
    for name, values in finals.items():
        missing = len(record.runs_of(name)) - len(values)
        if missing:
            console.print(f"{name}: {missing} of its runs did not reach the last step")


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
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    given, options = parser.parse_args(words[:split]), words[split + 1 :]
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
