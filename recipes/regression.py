"""Regression by attention: a curve or a table, all of its points one sequence, against GPs.

    accelerate launch recipes/regression.py
    accelerate launch recipes/regression.py --dataset airline
    accelerate launch recipes/regression.py --dataset concrete --file concrete.csv --target strength
    accelerate launch recipes/regression.py --attention sdpa expressive:scale=learned gp-rbf

The protocol is that of K. Song, Y. Jung, D. Kim, I.-C. Moon, "Implicit kernel attention", AAAI 2021,
arXiv 2006.06147: one post-norm encoder layer without positions and without a mask reads the inputs
of all points, and its output at a point is the prediction there. The loss is that of a random 90 %
of the points, the error that of the others, and the whole is repeated with other random numbers.
The rivals are Gaussian processes with an RBF and with a spectral mixture kernel.

Two numbers stand side by side. "best epoch" is the paper's rule, the lowest held-out error of all
epochs: it selects on the points it reports, so it is too good. "selected" halves the held-out
points, and each half is measured at the epoch that is best on the other. "last epoch", which selects
nothing, is in results.json beside them.

co2 (monthly means of the flask samples of Mauna Loa, 1958 to 2001) comes with statsmodels, airline (the
monthly passengers of Box and Jenkins) with sktime. The other data sets of the paper are not ours to
ship: --file takes a CSV file of numbers with a line of column names. housing: the Boston data of
Harrison and Rubinfeld; concrete and parkinsons: UCI Machine Learning Repository. Heads and exponents p
follow the paper's table for each. What we do not know of the paper is ours: inputs and targets are
standardised, the weights start as PyTorch's layers do, no dropout but that of the magnitudes.

A repeat of co2 takes six minutes on one CPU core, one of airline half a minute. Several processes
share the kinds among them, and --resume goes on where an interrupted run ended, a repeat at a time:

    accelerate launch --num_processes 4 recipes/regression.py --resume
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from arguments import ATTENTION_HELP, Attention, option, parse, require, require_at_least
from numpy.typing import NDArray
from regression_data import DataOptions, Points, Split, read_points
from regression_models import (
    PROCESSES,
    GaussianProcess,
    PointRegressor,
    RegressorConfig,
    network_fits,
    process_fits,
)
from regression_results import plot, print_table
from reporting import Record, Run, environment
from rich.console import Console
from tqdm import tqdm


@dataclass(frozen=True)
class Protocol:
    """Heads and exponents of a data set in the paper's table; IKAN's and MIKAN's heads are 8 in all."""

    softmax_heads: int
    direct_p: float
    copula_p: float


#: "other" is ours.
PROTOCOLS = {
    "co2": Protocol(8, 3.0, 3.0),
    "airline": Protocol(4, 2.0, 3.0),
    "housing": Protocol(4, 3.0, 1.8),
    "concrete": Protocol(4, 2.0, 1.8),
    "parkinsons": Protocol(4, 3.0, 2.0),
    "other": Protocol(8, 2.0, 2.0),
}
KERNEL_HEADS = 8


@dataclass
class TrainingOptions:
    _argument_group_name: ClassVar[str] = "training"

    attention: list[str] | None = field(
        default=None,
        metadata={
            "help": f"{ATTENTION_HELP}; {' and '.join(PROCESSES)} are Gaussian processes; without it "
            "sdpa, implicit_kernel with kernel=direct and kernel=copula and the paper's p, "
            "expressive, and both processes"
        },
    )
    repeats: int = option(10, "runs of each kind, with the seeds 0, 1, …")
    epochs: int = option(1000, "full-batch steps of Adam")
    learning_rate: float = option(0.01, "of Adam, constant")
    held_out: float = option(0.1, "share of the points that the error is measured on")
    width: int = option(64, "size of the hidden state")
    heads: int | None = option(None, "heads of all kinds of attention; without it the paper's")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "repeats", "epochs", "width")
        require(
            self.learning_rate > 0, f"--learning_rate must be positive, got {self.learning_rate}."
        )
        require(0 < self.held_out < 1, f"--held_out must be between 0 and 1, got {self.held_out}.")
        if self.heads is not None:
            require_at_least(self, 1, "heads")


@dataclass
class OutputOptions:
    _argument_group_name: ClassVar[str] = "output"

    output_dir: str = option("outputs/regression", "folder for results and picture")
    overwrite: bool = option(False, "replace the results that the output folder already holds")
    resume: bool = option(
        False, "keep the repeats that the output folder already holds, add the others"
    )

    def __post_init__(self) -> None:
        require(
            not (self.overwrite and self.resume), "--overwrite and --resume exclude each other."
        )


@dataclass(frozen=True)
class Kind:
    """What is compared: a kind of attention with its heads, or a Gaussian process."""

    text: str
    attention: Attention | None
    heads: int = 0

    @classmethod
    def parse_all(cls, data: DataOptions, training: TrainingOptions) -> list[Kind]:
        """Every kind asked for, heads and exponents from the paper's table where none are given.

        Raises:
            ValueError: an unknown kind or option, or heads that do not divide the width.
        """
        protocol = PROTOCOLS[data.dataset]
        texts = training.attention or [
            "sdpa",
            f"implicit_kernel:kernel=direct,p={protocol.direct_p}",
            f"implicit_kernel:kernel=copula,p={protocol.copula_p}",
            "expressive",
            *PROCESSES,
        ]
        require(len(set(texts)) == len(texts), f"--attention names one kind twice: {texts}.")
        Attention.parse_all([text for text in texts if text not in PROCESSES])
        kinds = []
        for text in texts:
            if text in PROCESSES:
                kinds.append(cls(text, None))
                continue
            attention = Attention.parse(text)
            of_paper = (
                KERNEL_HEADS
                if attention.implementation == "implicit_kernel"
                else protocol.softmax_heads
            )
            kinds.append(cls(text, attention, training.heads or of_paper))
            require(
                training.width % kinds[-1].heads == 0,
                f"--width must be a multiple of the {kinds[-1].heads} heads of {text}, "
                f"got {training.width}.",
            )
        return kinds

    @property
    def section(self) -> dict[str, Any]:
        """As `attention` in `reporting.Run`."""
        if self.attention is None:
            return {"mechanism": self.text}
        return {**self.attention.section, "heads": self.heads}


# ---- runs ----------------------------------------------------------------------------------------


def best_epoch(errors: NDArray[np.float64]) -> float:
    """The paper's rule: the lowest root mean square error of all epochs.

    Args:
        errors: (epochs, held-out points).
    """
    return float(np.sqrt(np.square(errors).mean(axis=1).min()))


def selected(errors: NDArray[np.float64]) -> float:
    """Root mean square error with each half of the points at the other half's best epoch.

    Args:
        errors: (epochs, held-out points), the points in random order.
    """
    squared = np.square(errors)
    half = squared.shape[1] // 2
    halves = squared[:, :half], squared[:, half:]
    total = sum(
        judged[chooser.mean(axis=1).argmin()].sum() for chooser, judged in (halves, halves[::-1])
    )
    return float(np.sqrt(total / squared.shape[1]))


def train(
    kind: Kind,
    points: Points,
    training: TrainingOptions,
    seed: int,
    device: torch.device,
    bar: tqdm,
) -> tuple[Run, NDArray[np.float64]]:
    """One run, and its predictions (points,) at the paper's epoch, in the target's unit.

    Raises:
        RuntimeError: predictions that are not finite.
    """
    set_seed(seed)
    split = Split.draw(points, training.held_out, seed)
    model: Any
    if kind.attention is None:
        known = split.inputs[split.train].to(device), split.target[split.train].to(device)
        model = GaussianProcess(kind.text, *known).double().to(device)
        fits = process_fits(model, split, training.epochs, training.learning_rate)
    else:
        config = RegressorConfig(
            num_inputs=split.inputs.shape[1],
            hidden_size=training.width,
            num_attention_heads=kind.heads,
        )
        model = kind.attention.build(PointRegressor._from_config, config)
        model = model.to(device)
        fits = network_fits(model, split, training.epochs, training.learning_rate)

    start = time.perf_counter()
    bar.set_description(f"{kind.text} seed {seed}")
    errors, train_errors, lowest, best = [], [], float("inf"), split.target
    for epoch, fit in enumerate(fits):
        error = (fit - split.target) * split.deviation
        rmse = error[split.held_out].square().mean().sqrt().item()
        if not torch.isfinite(fit).all():
            raise RuntimeError(
                f"{kind.text}, seed {seed}: predictions are not finite after {epoch + 1} epochs; "
                "lower --learning_rate."
            )
        if rmse < lowest:
            lowest, best = rmse, fit
        errors.append(error[split.held_out].numpy())
        train_errors.append(error[split.train].square().mean().sqrt().item())
        bar.update()
        bar.set_postfix(rmse=f"{rmse:.3f}", best=f"{lowest:.3f}", refresh=False)
    seconds = time.perf_counter() - start

    rmse = np.sqrt(np.square(errors).mean(axis=1))
    # The first epoch, then about fifty.
    shown = sorted({0, *range(training.epochs - 1, 0, -max(training.epochs // 50, 1))})
    run = Run(
        variant=kind.text,
        attention=kind.section,
        seed=seed,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=round(seconds, 1),
        curve={
            "step": [epoch + 1 for epoch in shown],
            "train_rmse": [round(train_errors[epoch], 5) for epoch in shown],
            "rmse": [round(rmse[epoch].item(), 5) for epoch in shown],
        },
        final={
            "rmse_selected": selected(np.stack(errors)),
            "rmse_best_epoch": best_epoch(np.stack(errors)),
            "rmse_last_epoch": rmse[-1].item(),
        },
    )
    return run, best.numpy() * split.deviation + split.mean


def describe(points: Points, training: TrainingOptions) -> dict[str, Any]:
    """The task in the terms of `reporting.Record`."""
    unit = f" in {points.unit}" if points.unit else ""
    return {
        "type": "tabular-regression",
        "name": f"{points.name} regression, held-out RMSE{unit}",
        "description": (
            "Predict the target of points from their inputs; all points are one sequence of "
            "which the targets of a random part are known."
        ),
        "dataset": {
            "name": points.name,
            "type": points.name,
            "split": f"random, {training.held_out:.0%} held out",
            "description": points.description,
        },
        "metric": {
            "type": "rmse",
            "key": "rmse_selected",
            "name": f"root mean square error{unit}",
            "description": (
                "Root mean square error of the held-out points. rmse_selected: each half of them at "
                "the epoch that is best on the other half. rmse_best_epoch: the paper's rule, the "
                "lowest of all epochs, which selects on the points it reports. rmse_last_epoch: "
                "after the last epoch."
            ),
        },
    }


def finished_runs(results: Path, settings: dict[str, Any], versions: dict[str, str]) -> list[Run]:
    """The runs of a record to which further repeats are to be added.

    Raises:
        ValueError: it was made with other settings or versions, so that its runs are not comparable.
    """
    before = Record.load(results)
    made = {**before.settings, **before.environment["versions"]}
    now = {**settings, **versions}
    other = [name for name in now if name != "repeats" and made.get(name) != now[name]]
    require(
        not other,
        f"--resume: {results} was made with other {', '.join(other)}; repeat its command, or choose "
        "another --output_dir.",
    )
    return [run for run in before.runs if run.seed < settings["repeats"]]


def main() -> None:
    data, training, output = parse(
        [DataOptions, TrainingOptions, OutputOptions], "regression.py", __doc__
    )
    folder = Path(output.output_dir)
    results, picture = folder / "results.json", folder / "fit.png"
    if results.exists() and not (output.overwrite or output.resume):
        sys.exit(
            f"error: {results} exists; choose another --output_dir, or pass --overwrite or --resume."
        )
    accelerator = Accelerator()
    runs: list[Run] = []
    try:
        kinds = Kind.parse_all(data, training)
        points = read_points(data)
        settings = {**asdict(data), **asdict(training), "attention": [kind.text for kind in kinds]}
        if results.exists() and output.resume:
            runs = finished_runs(results, settings, environment(accelerator)["versions"])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    seeds = range(len(runs) // len(kinds), training.repeats)
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    with accelerator.split_between_processes(kinds) as mine:
        bar = tqdm(
            total=len(seeds) * training.epochs * len(mine),
            unit="epoch",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
    record = None
    for seed in seeds:
        done = [train(kind, points, training, seed, accelerator.device, bar) for kind in mine]
        done = gather_object(done)
        runs += [run for run, _ in done]
        # What is finished is on disk, should a later repeat be interrupted.
        record = Record(
            recipe="regression",
            task=describe(points, training),
            settings={**settings, "repeats": seed + 1},
            runs=runs,
            environment=environment(accelerator),
        )
        if accelerator.is_main_process:
            record.save(results)
            if seed == 0:
                held_out = Split.draw(points, training.held_out, seed).held_out.numpy()
                plot(points, held_out, done, picture)
    bar.close()
    if accelerator.is_main_process:
        print_table(record or Record.load(results), console)
    # The picture is that of the first repeat, which may have been another run's.
    console.print(f"{results} {f'and {picture} ' if 0 in seeds else ''}written")
    accelerator.end_training()


if __name__ == "__main__":
    main()
