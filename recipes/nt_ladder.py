"""The ladder of NT(N, τ) sequences: which kind of attention reaches which complexity.

    accelerate launch recipes/nt_ladder.py --bases 2 4 --delays 2 3 --widths 8 16 --steps 300
    accelerate launch --num_processes 4 recipes/nt_ladder.py --output_dir outputs/nt_ladder

For every basis N, delay τ, width, kind of positions and kind of attention one-layer models learn
x_t = (x_{t−1} + x_{t−τ}) mod N, several seeds each, in two settings: a model for each (N, τ), and a
model for each N that is told τ by the first token of a sequence and learns all delays (multi-task).

Models of one width, positions and attention are trained at once, see stacked.py; every process takes
its share of these groups. A group that is finished is a file in the output folder and is not trained
again, so the same command goes on after an interruption. results.json and the heat maps of reached
accuracy are made of the groups that are there.

Sequences are drawn anew for every step. Where there are at least 4096 of them, those to measure on are
never trained on; of fewer, the same ones come again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import ATTENTION_HELP, Attention, option, parse, require, require_at_least
from loop import OutputOptions
from matplotlib.figure import Figure
from nt_prediction import ModelOptions, TaskOptions, model_config
from reporting import environment, write_text
from rich.console import Console
from rich.table import Table
from stacked import Stacked
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

#: Number of sequences from which on some are set aside.
_ENOUGH = 4096
_ARCHITECTURES = {"absolute": "gpt2", "rotary": "llama"}


@dataclass
class LadderOptions:
    _argument_group_name: ClassVar[str] = "the ladder"

    bases: list[int] = field(
        default_factory=lambda: [2, 4, 8, 16, 32], metadata={"help": "N: powers of two"}
    )
    delays: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 7, 8], metadata={"help": "τ"})
    widths: list[int] = field(
        default_factory=lambda: [8, 16, 32, 64], metadata={"help": "sizes of the hidden state"}
    )
    positions: list[str] = field(
        default_factory=lambda: ["absolute", "rotary"],
        metadata={"help": "absolute: GPT-2 with learned positions; rotary: Llama"},
    )
    settings: list[str] = field(
        default_factory=lambda: ["single", "multi"],
        metadata={"help": "single: a model for each (N, τ); multi: one for all τ of an N"},
    )
    attention: list[str] = field(
        default_factory=lambda: ["sdpa", "expressive", "implicit_kernel"],
        metadata={"help": ATTENTION_HELP},
    )
    seeds: int = option(5, "models of each kind, with seeds 0, 1, …")
    heads: int = option(1, "attention heads")
    length: int = option(32, "symbols in a sequence")
    steps: int = option(2500, "steps of training")
    batch_size: int = option(128, "sequences in a step")
    learning_rate: float = option(2e-3, "of Adam, constant")
    initializer_range: float | None = option(
        None, "standard deviation of the initial weights; without it width^-0.5"
    )
    validation_size: int = option(512, "sequences to measure on, of every delay")
    evaluate_every: int = option(250, "steps between two measurements")
    share: str = option(
        "1/1",
        "train the second of three shares of the groups: 2/3; for several processes on one GPU, each "
        "started by itself",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "seeds", "heads", "steps", "batch_size", "evaluate_every")
        for basis in self.bases:
            require(
                basis >= 2 and basis & (basis - 1) == 0,
                f"--bases must be powers of two from 2 on, got {basis}.",
            )
        require(min(self.delays) >= 2, f"--delays must be at least 2, got {min(self.delays)}.")
        require(
            self.length > max(self.delays),
            f"--length must exceed the longest delay, {max(self.delays)}; got {self.length}.",
        )
        for width in self.widths:
            require(
                width % (2 * self.heads) == 0,
                f"--widths must be multiples of twice --heads, which is {self.heads}; got {width}.",
            )
        for name, known in (("positions", _ARCHITECTURES), ("settings", ("single", "multi"))):
            unknown = set(getattr(self, name)) - set(known)
            require(not unknown, f"--{name} must be of {', '.join(known)}; got {unknown}.")
        part, _, parts = self.share.partition("/")
        require(
            part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts),
            f"--share must look like 2/3, got {self.share}.",
        )
        Attention.parse_all(self.attention)


@dataclass(frozen=True)
class Group:
    """Models that are trained together."""

    attention: str
    positions: str
    width: int
    setting: str

    @property
    def file_name(self) -> str:
        name = Attention.parse(self.attention).file_name
        return f"{self.setting}-{self.positions}-{self.width}-{name}.json"


class Sequences:
    """NT(N, τ) sequences for R replicas at once.

    Args:
        bases: (R,).
        delays: (R,), or (D,) of which every sequence has one, named by a token before it.
        multi: which of the two.
    """

    def __init__(self, bases: Tensor, delays: Tensor, multi: bool, length: int, seed: int) -> None:
        self.bases, self.delays, self.multi, self.length = bases, delays, multi, length
        self.generator = torch.Generator(bases.device).manual_seed(seed)
        #: Tokens that name a delay follow the symbols.
        self.first_name = int(bases.max())
        odd = 2 * torch.arange(int(delays.max()), device=bases.device) + 1
        self.factors = odd  # of the sum that decides what is set aside

    def draw(self, count: int, validation: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens (R, count, length [+ 1]) and whether each is determined by those before it."""
        replicas, device = len(self.bases), self.bases.device
        basis = self.bases[:, None]
        if self.multi:
            if validation:  # every delay alike
                choice = torch.arange(count, device=device) % len(self.delays)
                choice = choice.expand(replicas, -1)
            else:
                choice = self._uniform(len(self.delays), (replicas, count))
            delay = self.delays[choice]
        else:
            delay = self.delays[:, None].expand(-1, count)
        most = int(self.delays.max())
        heads = (
            torch.rand((replicas, count, most), generator=self.generator, device=device)
            * basis[..., None]
        ).long()
        heads[..., 0] = self._set_aside(heads, basis, delay, validation)
        symbols = torch.zeros((replicas, count, self.length), dtype=torch.long, device=device)
        symbols[..., :most] = heads
        for t in range(2, self.length):
            back = symbols.gather(-1, (t - delay).clamp(min=0)[..., None])[..., 0]
            following = (symbols[..., t - 1] + back) % basis
            symbols[..., t] = torch.where(delay <= t, following, symbols[..., t])
        determined = torch.arange(self.length, device=device) >= delay[..., None]
        if not self.multi:
            return symbols, determined
        name = self.first_name + choice[..., None]
        return (
            torch.cat([name, symbols], dim=-1),
            torch.cat([torch.zeros_like(name, dtype=torch.bool), determined], dim=-1),
        )

    def _uniform(self, below: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.bases.device)

    def _set_aside(self, heads: Tensor, basis: Tensor, delay: Tensor, validation: bool) -> Tensor:
        """The first symbols, changed so that a weighted sum of the head tells the two sets apart."""
        modulus = basis.clamp(max=8)
        index = torch.arange(heads.shape[-1], device=heads.device)
        used = torch.where(index < delay[..., None], heads, 0)
        code = (used * self.factors).sum(dim=-1) % modulus
        apart = delay * basis.log2() >= math.log2(_ENOUGH)
        random = self._uniform(2**20, code.shape)
        if validation:
            shift = torch.where(apart, -code, 0)
        else:
            shift = torch.where(apart & (code == 0), 1 + random % (modulus - 1), 0)
        return (heads[..., 0] + shift) % basis


def make_models(group: Group, options: LadderOptions) -> list[Any]:
    """One model for each seed."""
    attention, names = Attention.parse(group.attention), group.setting == "multi"
    models = []
    for seed in range(options.seeds):
        set_seed(seed)
        config = model_config(
            ModelOptions(
                architecture=_ARCHITECTURES[group.positions],  # type: ignore[arg-type]
                width=group.width,
                heads=options.heads,
                initializer_range=options.initializer_range,  # type: ignore[arg-type]
            ),
            TaskOptions(
                basis=max(options.bases) + names * len(options.delays),
                delay=max(options.delays),
                length=options.length + names,
                train_size=1,
                validation_size=1,
            ),
        )
        models.append(attention.causal_lm(config))
    return models


def train_group(group: Group, options: LadderOptions, device: torch.device) -> dict[str, Any]:
    """Trains all models of a group; accuracy of each, by basis, delay and seed."""
    multi = group.setting == "multi"
    tasks = list(product(options.bases, options.delays)) if not multi else None
    bases = [basis for basis, _ in tasks] if tasks is not None else options.bases
    models = make_models(group, options)
    stacked = Stacked([model for _ in bases for model in models], Attention.parse(group.attention))
    stacked.to(device).train()
    optimizer = torch.optim.Adam(
        stacked.parameters(), lr=options.learning_rate, fused=device.type == "cuda"
    )
    seeds = options.seeds
    basis = torch.tensor(bases, device=device).repeat_interleave(seeds)
    delays = torch.tensor(options.delays if multi else [delay for _, delay in tasks or ()])
    delay = delays.to(device) if multi else delays.to(device).repeat_interleave(seeds)
    data = Sequences(basis, delay, multi, options.length, seed=1)
    held_out = Sequences(basis, delay, multi, options.length, seed=2)
    vocabulary = stacked.config.vocab_size
    forbidden = torch.arange(vocabulary, device=device) >= basis[:, None]

    def logits(ids: Tensor) -> Tensor:
        """Of the next symbols; those beyond the basis are not among them."""
        return stacked(ids)[:, :, :-1].masked_fill(forbidden[:, None, None], -torch.inf)

    count = options.validation_size * (len(options.delays) if multi else 1)
    validation, determined = held_out.draw(count, validation=True)

    @torch.no_grad()
    def accuracies() -> Tensor:
        """(replicas,), or (replicas, delays) with several tasks."""
        stacked.eval()
        right, counted = [], []
        for ids, wanted in zip(validation.split(512, 1), determined.split(512, 1), strict=True):
            wanted = wanted[..., 1:]
            right.append(((logits(ids).argmax(-1) == ids[..., 1:]) & wanted).sum(-1))
            counted.append(wanted.sum(-1))
        stacked.train()
        hits, total = torch.cat(right, 1), torch.cat(counted, 1)
        if multi:
            parts = (len(options.delays), -1)
            hits, total = (x.unflatten(1, parts[::-1]).sum(1) for x in (hits, total))
            return hits / total
        return hits.sum(1) / total.sum(1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        """Several steps' sequences are drawn together: that takes as many operations as one's."""
        at_once = 16
        for _ in range(0, options.steps, at_once):
            ids, wanted = data.draw(at_once * options.batch_size)
            yield from zip(
                ids.split(options.batch_size, 1), wanted.split(options.batch_size, 1), strict=True
            )

    started = time.perf_counter()
    curve = []
    bar = tqdm(total=options.steps, desc=group.file_name.removesuffix(".json"), unit="step")
    for step, (ids, wanted) in zip(range(1, options.steps + 1), batches(), strict=False):
        losses = cross_entropy(
            logits(ids).flatten(0, 2), ids[..., 1:].flatten(), reduction="none"
        ).view(wanted[..., 1:].shape)
        wanted = wanted[..., 1:]
        mean = torch.where(wanted, losses, 0).sum((1, 2)) / wanted.sum((1, 2))
        mean.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if step % options.evaluate_every == 0 or step == options.steps:
            found = accuracies()
            curve.append({"step": step, "accuracy": found.mean().item()})
            bar.set_postfix(accuracy=f"{curve[-1]['accuracy']:.3f}", refresh=False)
    bar.close()
    by_seed = found.view(len(bases), seeds, -1).cpu()
    cells = {}
    for i, n in enumerate(bases):
        for j in range(by_seed.shape[-1]):
            tau = options.delays[j] if multi else tasks[i][1]  # type: ignore[index]
            cells[f"{n},{tau}"] = [round(value, 6) for value in by_seed[i, :, j].tolist()]
    return {
        "group": asdict(group),
        "seconds": round(time.perf_counter() - started, 1),
        "parameters_each": sum(p.numel() for p in stacked.parameters()) // len(basis),
        "curve": curve,
        "accuracy": cells,
    }


# ---- results -------------------------------------------------------------------------------------


def mean_map(found: dict[str, list[float]], options: Any) -> list[list[float]]:
    """Mean accuracy over seeds: a row for each delay, a column for each basis."""
    return [
        [statistics.fmean(found[f"{basis},{delay}"]) for basis in options["bases"]]
        for delay in options["delays"]
    ]


def draw(results: dict[str, Any], positions: str, setting: str) -> Figure:
    """Heat maps of mean accuracy: a row for each width, a column for each kind of attention."""
    options = results["options"]
    widths, kinds = options["widths"], options["attention"]
    found = {
        (entry["group"]["width"], entry["group"]["attention"]): mean_map(entry["accuracy"], options)
        for entry in results["groups"]
        if (entry["group"]["positions"], entry["group"]["setting"]) == (positions, setting)
    }
    figure = Figure(
        figsize=(1.4 + 2.6 * len(kinds), 0.9 + 2.5 * len(widths)), dpi=130, layout="constrained"
    )
    panels = figure.subplots(len(widths), len(kinds), squeeze=False, sharex=True, sharey=True)
    for (row, width), (column, kind) in product(enumerate(widths), enumerate(kinds)):
        axes = panels[row][column]
        nothing = [[math.nan] * len(options["bases"]) for _ in options["delays"]]
        values = found.get((width, kind), nothing)
        image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
        if values is nothing:
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color="0.5")
            values = []
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                # Rounded down: what says 1.00 has reached it.
                shown = f"{math.floor(100 * value) / 100:.2f}".removeprefix("0")
                colour = "white" if value < 0.6 else "black"
                axes.text(x, y, shown, ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(options["bases"])), options["bases"])
        axes.set_yticks(range(len(options["delays"])), options["delays"])
        axes.tick_params(length=0)
        if row == 0:
            axes.set_title(kind, fontsize=9)
        if row == len(widths) - 1:
            axes.set_xlabel("basis N")
        if column == 0:
            axes.set_ylabel(f"width {width}\ndelay τ")
    figure.colorbar(image, ax=panels, shrink=0.5, label="accuracy, mean over seeds")
    title = (
        "one model for each (N, τ)" if setting == "single" else "one model for all delays of an N"
    )
    figure.suptitle(f"{positions} positions, {title}", fontsize=11)
    return figure


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For every setting, positions, width and attention: mean accuracy, and tasks solved.

    A task counts as solved by the share of seeds that reach an accuracy of 0.99.
    """
    rows = []
    for entry in results["groups"]:
        values = [value for cell in entry["accuracy"].values() for value in cell]
        rows.append(
            {
                **entry["group"],
                "mean_accuracy": statistics.fmean(values),
                "solved": statistics.fmean(value >= 0.99 for value in values),
            }
        )
    return rows


def print_summary(results: dict[str, Any], console: Console) -> None:
    kinds = results["options"]["attention"]
    table = Table(title="mean accuracy (share of models that reach 0.99)", title_style="bold")
    for name in ("setting", "positions", "width", *kinds):
        table.add_column(name, justify="left" if name in ("setting", "positions") else "right")
    cells = {
        (row["setting"], row["positions"], row["width"], row["attention"]): row
        for row in summary(results)
    }
    options = results["options"]
    for key in product(options["settings"], options["positions"], options["widths"]):
        rows = [cells.get((*key, kind)) for kind in kinds]
        shown = [
            f"{row['mean_accuracy']:.3f} ({row['solved']:.2f})" if row else "not run"
            for row in rows
        ]
        table.add_row(*map(str, key), *shown)
    console.print(table)


def report(folder: Path, groups: list[Group], results: dict[str, Any], console: Console) -> None:
    """Puts groups together: results.json, heat maps, table."""
    results["groups"] = [
        json.loads((folder / "groups" / group.file_name).read_text(encoding="utf-8"))
        for group in groups
    ]
    results["summary"] = summary(results)
    write_text(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    for positions, setting in sorted({(group.positions, group.setting) for group in groups}):
        draw(results, positions, setting).savefig(folder / f"{setting}-{positions}.png")
    print_summary(results, console)


def main() -> None:
    options, output = parse([LadderOptions, OutputOptions], "nt_ladder.py", __doc__)
    accelerator = Accelerator()
    folder = Path(output.output_dir or "outputs/nt_ladder")
    groups = [
        Group(attention, positions, width, setting)
        for setting, positions, width, attention in product(
            options.settings, options.positions, options.widths, options.attention
        )
    ]
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    settings = {key: value for key, value in asdict(options).items() if key != "share"}
    written = folder / "options.json"
    if output.overwrite and accelerator.is_main_process:
        for old in (folder / "groups").glob("*.json"):
            old.unlink()
        written.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if written.exists() and json.loads(written.read_text(encoding="utf-8")) != settings:
        sys.exit(f"error: {folder} holds groups of other options; pass --overwrite to drop them.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(written, json.dumps(settings, indent=1) + "\n")
    # Dear groups first, each to the next process: shares of about the same size.
    order = sorted(groups, key=lambda g: (-g.width, g.attention != "implicit_kernel", g.setting))
    part, parts = map(int, options.share.split("/"))
    mine = accelerator.process_index * parts + part - 1
    for number, group in enumerate(order):
        file = folder / "groups" / group.file_name
        if number % (accelerator.num_processes * parts) == mine and not file.exists():
            found = train_group(group, options, accelerator.device)
            write_text(file, json.dumps(found, indent=1) + "\n")
    accelerator.wait_for_everyone()
    missing = [group for group in groups if not (folder / "groups" / group.file_name).exists()]
    present = [group for group in groups if group not in missing]
    if accelerator.is_main_process and present:
        results = {
            "recipe": "nt_ladder",
            "options": settings,
            "environment": environment(accelerator),
        }
        report(folder, present, results, console)
    left = f", {len(missing)} of {len(groups)} groups are left" if missing else ""
    console.print(f"{folder}: results.json and heat maps are written{left}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
