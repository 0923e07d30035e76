"""How close to softmax attention a feature kernel starts, by the number of its features.

    accelerate launch recipes/closeness.py
    accelerate launch recipes/closeness.py --head_dims 128 --lengths 0.7 --features 64 512

Softmax attention is the RBF kernel times magnitudes. `init="gaussian"` and `init="orthogonal"` start
the kernels "stationary" and "direct" at samples of the RBF kernel's spectral density: a converted
model starts near its checkpoint. Two errors are measured for random queries and keys, standard normal
times a length:

* weight elsewhere: the mean over the rows of ½ Σ_j |w_ij − softmax_ij|, the share of attention weight
  that lies on other keys than softmax puts it on, between 0 and 1;
* kernel error: the root mean square of k(q, k) − exp(−‖q − k‖²/(4√d)).

Written: results.json (every figure with mean and deviation over the seeds, and the rate: the exponent
in error ~ M^rate, fitted from 64 features on) and closeness.png.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from arguments import option, parse, require, require_at_least
from matplotlib.figure import Figure
from reporting import Spread, environment, write_text
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_expressive import ImplicitKernelConfig
from hf_expressive.attention.spectral_density import LearnedFrequencies
from hf_expressive.ops.implicit_kernel import kernel_features, log_magnitude

#: Kernel and start: colour and line of the picture.
STARTS = {
    ("stationary", "gaussian"): ("#0072B2", "--"),
    ("stationary", "orthogonal"): ("#0072B2", "-"),
    ("direct", "gaussian"): ("#D55E00", "--"),
    ("direct", "orthogonal"): ("#D55E00", "-"),
}
MEASURES = {"weight_elsewhere": "weight elsewhere", "kernel_error": "kernel error"}
#: Fewer features than this are not what a rate speaks of.
RATE_FROM = 64


@dataclass
class Options:
    _argument_group_name: ClassVar[str] = "what is measured"

    head_dims: list[int] = field(
        default_factory=lambda: [16, 64], metadata={"help": "sizes of a head"}
    )
    lengths: list[float] = field(
        default_factory=lambda: [0.5, 1.0],
        metadata={"help": "factors of the standard normal queries and keys"},
    )
    features: list[int] = field(
        default_factory=lambda: [16, 64, 256, 1024, 4096],
        metadata={"help": "numbers M of features"},
    )
    keys: int = option(128, "queries, and keys, of a draw")
    seeds: int = option(10, "draws of frequencies, queries and keys")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "keys", "seeds")
        for name in ("head_dims", "lengths", "features"):
            values = getattr(self, name)
            require(
                bool(values) and min(values) > 0,
                f"--{name} must be positive numbers, got {values}.",
            )


@dataclass
class OutputOptions:
    _argument_group_name: ClassVar[str] = "output"

    output_dir: str = option("outputs/closeness", "folder for results and picture")
    overwrite: bool = option(False, "replace the results that the output folder already holds")


def errors(frequencies: Tensor, query: Tensor, key: Tensor, epsilon: float) -> dict[str, float]:
    """Both errors of a kernel, given by samples (1, S, d, M) of its density, on (1, 1, n, d)."""
    dim = query.shape[-1]
    scale = dim**-0.5
    features = [kernel_features(x, frequencies, scale) for x in (query, key)]
    kernel = torch.matmul(features[0], features[1].mT)
    rbf = torch.exp(-torch.cdist(query, key).square() / (4.0 * math.sqrt(dim)))
    weight = (kernel.square() + epsilon) * log_magnitude(key, 2.0, scale).exp()[:, :, None]
    weight = weight / weight.sum(dim=-1, keepdim=True)
    softmax = torch.softmax(torch.matmul(query, key.mT) * scale, dim=-1)
    return {
        "weight_elsewhere": float(0.5 * (weight - softmax).abs().sum(dim=-1).mean()),
        "kernel_error": float((kernel - rbf).square().mean().sqrt()),
    }


@torch.no_grad()
def measure(options: Options, kernel: str, init: str, dim: int, length: float) -> list[Any]:
    """One entry for each number of features: the errors' spread over the seeds."""
    entries = []
    for num_features in options.features:
        of_seeds: list[dict[str, float]] = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            query, key = length * torch.randn(2, 1, 1, options.keys, dim, dtype=torch.float64)
            settings = ImplicitKernelConfig(
                kernel=kernel,  # type: ignore[arg-type]
                init=init,  # type: ignore[arg-type]
                num_features=num_features,
            )
            density = LearnedFrequencies(settings, 1, dim)
            density.reset_parameters()
            of_seeds.append(errors(density.weight.double(), query, key, settings.epsilon))
        entries.append(
            {
                "features": num_features,
                **{
                    name: asdict(Spread.of([found[name] for found in of_seeds]))
                    for name in MEASURES
                },
            }
        )
    return entries


def rate(entries: list[Any], name: str) -> float | None:
    """The exponent in error ~ M^rate; `None` with fewer than two numbers of features to fit."""
    fitted = [entry for entry in entries if entry["features"] >= RATE_FROM]
    if len(fitted) < 2:
        return None
    x = np.log([entry["features"] for entry in fitted])
    y = np.log([entry[name]["mean"] for entry in fitted])
    return float(np.polyfit(x, y, 1)[0])


def command(options: Options) -> str:
    """What repeats the measurement."""
    words = ["accelerate launch recipes/closeness.py"]
    for name, value in asdict(options).items():
        values = value if isinstance(value, list) else [value]
        words.append(" ".join([f"--{name}", *map(str, values)]))
    return " ".join(words)


def plot(curves: list[dict[str, Any]], path: Path) -> None:
    """A panel for each size and length: weight elsewhere against the number of features."""
    panels = list(dict.fromkeys((curve["head_dim"], curve["length"]) for curve in curves))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.6), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (dim, length) in zip(grid, panels, strict=False):
        for curve in curves:
            if (curve["head_dim"], curve["length"]) != (dim, length):
                continue
            colour, style = STARTS[curve["kernel"], curve["init"]]
            x = [entry["features"] for entry in curve["entries"]]
            found = [entry["weight_elsewhere"] for entry in curve["entries"]]
            label = f"{curve['kernel']}, {curve['init']}"
            axes.loglog(
                x, [e["mean"] for e in found], style, color=colour, label=label, linewidth=1.5
            )
            axes.fill_between(
                x,
                [e["low"] for e in found],
                [e["high"] for e in found],
                color=colour,
                alpha=0.12,
                linewidth=0,
            )
        axes.set_title(f"head size {dim}, length {length:g}", fontsize=9)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(x, labels=[str(number) for number in x], fontsize=7)
        axes.tick_params(which="minor", length=0)
        axes.tick_params(labelsize=7)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("features M", fontsize=8)
    figure.supylabel("share of attention weight elsewhere than softmax's", fontsize=8)
    figure.legend(
        *grid[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(STARTS) if columns > 1 else 2,
        frameon=False,
        fontsize=7.5,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def print_table(curves: list[dict[str, Any]], options: Options, console: Console) -> None:
    table = Table(
        title=f"share of attention weight elsewhere than softmax's, mean ± deviation of {options.seeds}",
        title_style="bold",
    )
    table.add_column("head, length", no_wrap=True)
    table.add_column("start", overflow="fold")
    for number in options.features:
        table.add_column(f"M = {number}", justify="right", no_wrap=True)
    table.add_column("rate", justify="right", no_wrap=True)
    for curve in curves:
        cells = []
        for entry in curve["entries"]:
            found = entry["weight_elsewhere"]
            deviation = found["deviation"]
            spread = "" if deviation is None else f" ± {deviation:.3f}"
            cells.append(f"{found['mean']:.3f}{spread}")
        fitted = curve["rates"]["weight_elsewhere"]
        table.add_row(
            f"{curve['head_dim']}, {curve['length']:g}",
            f"{curve['kernel']}, {curve['init']}",
            *cells,
            "" if fitted is None else f"{fitted:.2f}",
        )
    console.print(table)


def main() -> None:
    options, output = parse([Options, OutputOptions], "closeness.py", __doc__)
    folder = Path(output.output_dir)
    results, picture = folder / "results.json", folder / "closeness.png"
    if results.exists() and not output.overwrite:
        sys.exit(f"error: {results} exists; choose another --output_dir, or pass --overwrite.")
    accelerator = Accelerator(cpu=True)
    curves = []
    for dim, length in itertools.product(options.head_dims, options.lengths):
        for kernel, init in STARTS:
            entries = measure(options, kernel, init, dim, length)
            curves.append(
                {
                    "kernel": kernel,
                    "init": init,
                    "head_dim": dim,
                    "length": length,
                    "rates": {name: rate(entries, name) for name in MEASURES},
                    "entries": entries,
                }
            )
    record = {
        "recipe": "closeness",
        "command": command(options),
        "settings": asdict(options),
        "environment": environment(accelerator),
        "curves": curves,
    }
    # Lists of numbers and words on one line, as in the records of the other recipes.
    text = json.dumps(record, indent=2)
    text = re.sub(r"\[\n[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    write_text(results, text + "\n")
    plot(curves, picture)
    console = Console(soft_wrap=True)
    print_table(curves, options, console)
    console.print(f"{results} and {picture} written")


if __name__ == "__main__":
    main()
