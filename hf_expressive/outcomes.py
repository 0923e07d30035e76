"""What a model card tells of a results record: the runs of one variant beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from .config import MechanismConfig, read_section


def check_parts(results: Mapping[str, Any]) -> None:
    missing = [key for key in ("task", "runs", "summary") if key not in results]
    if missing:
        raise ValueError(f"results lacks {', '.join(missing)}; see render_card for its form.")


@dataclass(frozen=True)
class Outcome:
    """The part of a record that a card tells.

    Attributes:
        task: see `Record` in the recipes.
        rows: for each variant `variant`, whether it is `this`, `spread`, `low`, `high`, `seeds`.
        mean: of the metric over the runs of this variant.
        seeds: of these runs.
        own: the run that the model is, if told.
        settings: names and values, as text.
        measured: one clause on date, programs and hardware; empty if unknown.
    """

    task: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    mean: float
    seeds: Sequence[int]
    own: Mapping[str, Any] | None
    settings: Mapping[str, str]
    measured: str

    @classmethod
    def read(
        cls,
        results: Mapping[str, Any],
        config: MechanismConfig,
        variant: str | None,
        seed: int | None,
    ) -> Outcome:
        check_parts(results)
        runs = [
            run
            for run in results["runs"]
            if variant in (None, run["variant"])
            and run["attention"]["mechanism"] == config.mechanism
            # Read, not compared as it stands: an older record lacks the options that came later.
            and read_section(run["attention"]) == config
        ]
        if not runs:
            raise ValueError(
                f"results holds no run with the attention of this model, {config}"
                f"{'' if variant is None else f', of the variant {variant!r}'}; it holds "
                f"{', '.join(results['summary'])}."
            )
        fitting = list(dict.fromkeys(run["variant"] for run in runs))
        if len(fitting) > 1:
            raise ValueError(
                f"results holds several variants with the attention of this model, "
                f"{', '.join(fitting)}; say variant= which one it is."
            )
        own = None
        if seed is not None:
            own = next((run for run in runs if run["seed"] == seed), None)
            if own is None:
                seeds = ", ".join(str(run["seed"]) for run in runs)
                raise ValueError(f"results holds no run with seed {seed}; the seeds are {seeds}.")
        (variant,) = fitting
        rows = [
            {
                "variant": name,
                "this": name == variant,
                "spread": _number(found["mean"])
                + ("" if found["deviation"] is None else f" ± {_number(found['deviation'])}"),
                "low": _number(found["low"]),
                "high": _number(found["high"]),
                "seeds": found["seeds"],
            }
            for name, found in results["summary"].items()
        ]
        return cls(
            task=results["task"],
            rows=rows,
            mean=results["summary"][variant]["mean"],
            seeds=results["summary"][variant]["seeds"],
            own=own,
            settings={
                name.replace("_", " "): text_of(value)
                for name, value in results.get("settings", {}).items()
            },
            measured=_measured(results.get("environment", {})),
        )

    @property
    def own_value(self) -> str | None:
        """The metric of the model itself, as text."""
        if self.own is None:
            return None
        return _number(self.own["final"][self.task["metric"]["key"]])

    def eval_results(self) -> list[EvalResult]:
        """For the `model-index`: the model's own value, if known, and the mean over the seeds."""
        metric, dataset = self.task["metric"], self.task["dataset"]
        seeds = ", ".join(map(str, self.seeds))
        values = [(f"{metric['name']}, mean of the runs with seeds {seeds}", self.mean)]
        if self.own is not None:
            values.insert(0, (metric["name"], self.own["final"][metric["key"]]))
        return [
            EvalResult(
                task_type=self.task["type"],
                task_name=self.task["name"],
                dataset_type=dataset["type"],
                dataset_name=dataset["name"],
                dataset_split=dataset.get("split"),
                dataset_args=dataset.get("args"),
                metric_type=metric["type"],
                metric_name=name,
                metric_value=round(value, 6),
            )
            for name, value in values
        ]


def _number(value: float) -> str:
    return f"{value:.4f}"


def text_of(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _measured(environment: Mapping[str, Any]) -> str:
    """Date, programs and hardware of a record as one clause."""
    clauses = []
    if "date" in environment:
        clauses.append(f"on {environment['date'][:10]}")
    if "versions" in environment:
        versions = environment["versions"].items()
        clauses.append("with " + ", ".join(f"{package} {number}" for package, number in versions))
    hardware = environment.get("hardware", {})
    if "accelerator" in hardware:
        clauses.append(f"on {hardware['accelerator']}")
    elif "processor" in hardware:
        clauses.append(f"on {hardware['processor']}")
    return ", ".join(clauses)
