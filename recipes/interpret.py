"""Looks into trained models: spectral densities, kernels, attention on antiparallel pairs.

    accelerate launch recipes/nt_prediction.py --layers 2 --heads 2 \\
        --attention sdpa expressive implicit_kernel:kernel=direct
    accelerate launch recipes/interpret.py --record outputs/nt_prediction/results.json

Reads the models that recipes/nt_prediction.py trained with one seed, and the sequences that it
measured them on. Written, with what `hf_expressive.analysis` returns and draws:

* antiparallel.png: the share of attention weight on pairs with q·k < 0, by layer and head, for every
  kind of attention (softmax attention as `kernel="rbf"`, which is the same);
* spectral_density-KIND.png and kernels-KIND.png, for kinds with a learned density: lengths of the
  frequencies, and k(0, δu) along the diagonal;
* results.json: the shares, and for each head the root mean square length of its frequencies and the
  distance at which its kernel first falls to one half.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from arguments import option, parse, require_at_least
from nt_prediction import TaskOptions, nt_dataset
from reporting import Record, Run, environment, write_text
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from hf_expressive import ImplicitKernelConfig, analysis, attach
from hf_expressive.registry import MECHANISMS


@dataclass
class Options:
    _argument_group_name: ClassVar[str] = "what is looked at"

    record: str = option("outputs/nt_prediction/results.json", "results of nt_prediction.py")
    seed: int = option(0, "which of its seeds")
    sequences: int = option(64, "validation sequences to run the models on")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "sequences")


@dataclass
class OutputOptions:
    _argument_group_name: ClassVar[str] = "output"

    output_dir: str = option("outputs/interpret", "folder for results and pictures")
    overwrite: bool = option(False, "replace the results that the output folder already holds")


def load(run: Run, folder: Path) -> Any:
    """The trained model of a run; one of Transformers' own attention as the RBF kernel."""
    model = AutoModelForCausalLM.from_pretrained(folder / str(run.folder))
    if run.attention["mechanism"] not in MECHANISMS:
        attach(model, ImplicitKernelConfig(kernel="rbf", norm_dropout=0.0))
    return model


def half_width(profile: Tensor, distances: Tensor) -> list[float | None]:
    """For each head the first distance at which its kernel is at most half of k(0, 0)."""
    fallen = profile <= 0.5 * profile[:, :1]
    return [float(distances[head.int().argmax()]) if bool(head.any()) else None for head in fallen]


def look(model: Any, ids: Tensor) -> dict[str, Any]:
    """Everything `analysis` tells of a model, the plots included."""
    masses = analysis.antiparallel_mass(model, input_ids=ids)
    found: dict[str, Any] = {"antiparallel": masses, "figures": {}, "kernels": {}}
    try:
        samples = analysis.spectral_samples(model, input_ids=ids)
    except ValueError:  # No layer has a learned density.
        return found
    distances = torch.linspace(0.0, 8.0, 801)
    for name, frequencies in samples.items():
        profile = analysis.kernel_profile(frequencies, torch.ones(frequencies.shape[2]), distances)
        found["kernels"][name] = {
            "frequency_rms": frequencies.square().sum(2).mean((1, 2)).sqrt().tolist(),
            "half_width": half_width(profile, distances),
        }
    found["figures"] = {
        "spectral_density": analysis.plot_spectral_density(samples),
        "kernels": analysis.plot_kernels(samples),
    }
    return found


def layer_name(name: str) -> str:
    """The number in a module's path, as "layer 0"."""
    return next((f"layer {part}" for part in name.split(".") if part.isdigit()), name)


def print_table(looks: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="share of attention weight on pairs with q·k < 0", title_style="bold")
    table.add_column("attention", overflow="fold")
    table.add_column("layer", justify="right")
    table.add_column("heads", justify="right", no_wrap=True)
    for kind, found in looks.items():
        for name, mass in found["antiparallel"].items():
            heads = "  ".join(f"{share:.3f}" for share in mass.tolist())
            table.add_row(kind, layer_name(name).removeprefix("layer "), heads)
    console.print(table)


def main() -> None:
    options, output = parse([Options, OutputOptions], "interpret.py", __doc__)
    folder, source = Path(output.output_dir), Path(options.record)
    results = folder / "results.json"
    if results.exists() and not output.overwrite:
        sys.exit(f"error: {results} exists; choose another --output_dir, or pass --overwrite.")
    if not source.exists():
        sys.exit(f"error: there is no {source}; run recipes/nt_prediction.py first.")
    record = Record.load(source)
    runs = [run for run in record.runs if run.seed == options.seed]
    if not runs or record.recipe != "nt_prediction":
        sys.exit(f"error: {source} holds no run of nt_prediction.py with seed {options.seed}.")
    accelerator = Accelerator(cpu=True)
    disable_progress_bar()  # Transformers' own, for loading
    task = TaskOptions(**{part.name: record.settings[part.name] for part in fields(TaskOptions)})
    ids = nt_dataset(task, options.seed)["validation"][: options.sequences]["input_ids"]

    looks = {run.variant: look(load(run, source.parent), ids) for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "antiparallel": analysis.plot_antiparallel_mass(
            {
                f"{kind}, {layer_name(name)}": mass
                for kind, found in looks.items()
                for name, mass in found["antiparallel"].items()
            }
        )
    }
    for kind, found in looks.items():
        mark = kind.replace(":", "-").replace("=", "-").replace(",", "-")
        pictures |= {f"{name}-{mark}": figure for name, figure in found["figures"].items()}
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    content = {
        "recipe": "interpret",
        "settings": {
            "seed": options.seed,
            "sequences": options.sequences,
            "trained": {"recipe": record.recipe, **record.settings},
        },
        "environment": environment(accelerator),
        "runs": [
            {
                "variant": run.variant,
                "final": run.final,
                "antiparallel": {
                    n: m.tolist() for n, m in looks[run.variant]["antiparallel"].items()
                },
                "kernels": looks[run.variant]["kernels"],
            }
            for run in runs
        ],
    }
    # Lists of numbers and words on one line, as in the records of the other recipes.
    text = re.sub(
        r"\[\n[^][{}]*\]",
        lambda found: " ".join(found[0].split()),
        json.dumps(content, indent=2, ensure_ascii=False),
    )
    write_text(results, text + "\n")
    console = Console(soft_wrap=True)
    print_table(looks, console)
    console.print(f"{results} and {len(pictures)} pictures written")


if __name__ == "__main__":
    main()
