"""Table and picture of a conversion: what each stage brought, and whether the mechanism is needed."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from reporting import Record, Run, Spread
from rich.console import Console
from rich.table import Table

#: Relative error of a layer up to which a variant computes what the softmax layer computes.
LOSSLESS = 1e-6
#: Stages in order, as in the keys of a run's `final`; the finished model's keys have no ending.
STAGES = {
    "base": "original",
    "swapped": "untouched",
    "transferred": "stage 1",
    "": "stage 2",
    "uniform": "weights uniform",
    "zero": "heads silent",
}
_ERRORS = {"swapped": "untouched", "transferred": "stage 1", "uniform": "weights uniform"}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def spread(runs: list[Run], key: str, stage: str) -> Spread:
    """A quantity at a stage over the runs of a variant."""
    return Spread.of([run.final[f"{key}_{stage}" if stage else key] for run in runs])


def layers(run: Run) -> int:
    """Number of attention layers whose errors a run holds."""
    return sum(key.startswith("error_swapped_") for key in run.final)


def print_conversion(record: Record, console: Console) -> None:
    """The metric by stage, and the error of each layer by stage; mean ± deviation over seeds."""
    metric = record.task["metric"]
    table = Table(title=f"{record.task['name']}: {metric['name']}", title_style="bold")
    table.add_column("", no_wrap=True)
    for variant in record.variants:
        table.add_column(variant, justify="right", overflow="fold", min_width=15)
    for stage, title in STAGES.items():
        found = [
            spread(record.runs_of(variant), metric["key"], stage) for variant in record.variants
        ]
        table.add_row(title, *map(str, found), end_section=stage in ("base", ""))
    console.print(table)
    console.print(
        "weights uniform, heads silent: the finished model with its mechanism replaced; what is left "
        "is what it does without it.\n"
    )
    errors = Table(title="error of a layer, |student − teacher|² / |teacher|²", title_style="bold")
    errors.add_column("attention", overflow="fold")
    for title in ("layer", *_ERRORS.values()):
        errors.add_column(title, justify="right", no_wrap=True)
    for variant in record.variants:
        runs = record.runs_of(variant)
        last = layers(runs[0]) - 1
        for layer in range(last + 1):
            found = [spread(runs, f"error_{stage}", str(layer)) for stage in _ERRORS]
            cells = [f"{value.mean:.2g}" for value in found]
            name = "" if layer else variant
            errors.add_row(name, str(layer), *cells, end_section=layer == last)
    console.print(errors)


def plot_conversion(record: Record, path: Path) -> None:
    """Left the metric by stage, a line a variant; right the error of each layer before and after."""
    metric = record.task["metric"]
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = ["swapped", "transferred", ""]
    bypass = ["uniform", "zero"]
    for index, variant in enumerate(record.variants):
        colour = _COLOURS[index % len(_COLOURS)]
        runs = record.runs_of(variant)
        shift = 0.06 * (index - (len(record.variants) - 1) / 2)
        for stages, start, style in ((trained, 0, "-"), (bypass, 3, "")):
            found = [spread(runs, metric["key"], stage) for stage in stages]
            places = [start + i + shift for i in range(len(stages))]
            means = [value.mean for value in found]
            # Rounding may put the mean of equal values beyond them.
            reach = [
                [max(value.mean - value.low, 0.0) for value in found],
                [max(value.high - value.mean, 0.0) for value in found],
            ]
            left.errorbar(
                places,
                means,
                yerr=reach,
                color=colour,
                marker="o",
                markersize=5,
                markerfacecolor=colour if style else "white",
                linestyle=style or "none",
                linewidth=1.6,
                capsize=3,
                label=variant if style else None,
            )
        for stage, style in (("swapped", ":"), ("transferred", "-")):
            errors = [spread(runs, f"error_{stage}", str(i)).mean for i in range(layers(runs[0]))]
            # A layer that computes softmax has no error, and a logarithmic axis no zero.
            shown = [error if error > LOSSLESS else math.nan for error in errors]
            right.plot(
                range(len(errors)),
                shown,
                color=colour,
                linestyle=style,
                marker="o",
                markersize=3.5,
                linewidth=1.6,
            )
    base = spread(record.runs, metric["key"], "base").mean
    left.axhline(base, color="0.45", linewidth=0.9, linestyle="--")
    left.annotate(
        "original",
        (4.45, base),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.35",
        fontsize=9,
    )
    left.set_xticks(
        range(5), ["untouched", "stage 1", "stage 2", "weights\nuniform", "heads\nsilent"]
    )
    left.axvspan(2.5, 4.5, color="0.95", zorder=0)
    left.set_xlim(-0.5, 4.5)
    left.set(ylabel=metric["name"], title=record.task["name"])
    left.text(3.5, 0.02, "mechanism replaced", transform=left.get_xaxis_transform(), ha="center")
    right.set_yscale("log")
    right.set(
        xlabel="attention layer",
        ylabel="|student − teacher|² / |teacher|²",
        title="error of a layer: untouched dotted, after stage 1 solid",
    )
    right.set_xticks(range(layers(record.runs[0])))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
