"""Table and picture of the regression recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from regression_data import Points
from reporting import Record, Run, Spread
from rich.console import Console
from rich.table import Table

#: The measures side by side: key in `Run.final`, heading.
MEASURES = {"rmse_selected": "selected", "rmse_best_epoch": "best epoch"}


def print_table(record: Record, console: Console) -> None:
    """Mean and deviation of both measures for each kind, and of its difference to the first kind."""
    repeats = len(record.runs) // len(record.variants)
    title = f"{record.task['name']}, mean ± deviation of {repeats} runs"
    table = Table(title=title, title_style="bold")
    table.add_column("kind", overflow="fold")
    first = record.variants[0]
    beside = f"selected − {first}"
    for heading in (*MEASURES.values(), beside, "parameters", "a run"):
        table.add_column(heading, justify="right", no_wrap=True)
    for variant in record.variants:
        runs = record.runs_of(variant)
        # Runs with one seed share their split.
        differences = [
            run.final["rmse_selected"] - rival.final["rmse_selected"]
            for run, rival in zip(runs, record.runs_of(first), strict=True)
        ]
        table.add_row(
            variant,
            *(str(Spread.of([run.final[key] for run in runs])) for key in MEASURES),
            "" if variant == first else str(Spread.of(differences)),
            f"{runs[0].parameters:,}",
            f"{Spread.of([run.seconds for run in runs]).mean:.0f} s",
        )
    # A file or a pipe has no width of its own; rich's guess of 80 columns would cut names.
    if not console.is_terminal:
        console.width = max(console.width, 100)
    console.print(table)


def plot(
    points: Points,
    held_out: NDArray[np.int64],
    fits: Sequence[tuple[Run, NDArray[np.float64]]],
    path: Path,
) -> None:
    """One panel a kind: the fitted curve over a single input, else predictions against targets."""
    columns = min(len(fits), 3)
    rows = -(-len(fits) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.5), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    is_curve = points.inputs.shape[1] == 1
    unit = f", {points.unit}" if points.unit else ""
    for axes, (run, fit) in zip(grid, fits, strict=False):
        across = points.inputs[:, 0] if is_curve else points.target
        down = points.target if is_curve else fit
        seen = np.delete(np.arange(len(across)), held_out)
        axes.plot(across[seen], down[seen], ".", color="0.65", markersize=2.5, label="training")
        axes.plot(
            across[held_out], down[held_out], "o", color="#D55E00", markersize=3, label="held out"
        )
        if is_curve:
            order = across.argsort()
            axes.plot(across[order], fit[order], color="#0072B2", linewidth=1, label="prediction")
        else:
            axes.axline((points.target.mean(),) * 2, slope=1, color="0.5", linewidth=0.8)
        axes.set_title(
            f"{run.variant}\nRMSE, best epoch: {run.final['rmse_best_epoch']:.3f}", fontsize=8
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    for axes in grid[len(fits) :]:
        axes.remove()
    figure.supxlabel(points.columns[0] if is_curve else f"target{unit}", fontsize=8)
    figure.supylabel(f"target{unit}" if is_curve else f"prediction{unit}", fontsize=8)
    figure.legend(
        *grid[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
