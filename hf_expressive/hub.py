"""Model cards: what a variant is, how to load it, how it was trained, what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from .config import SECTION, MechanismConfig, read_section
from .registry import MECHANISMS, options_of

#: Where the template lies: beside this file in an installed wheel, in `model_cards/` of a checkout.
_TEMPLATES = (
    Path(__file__).parent / "model_card_template.md",
    Path(__file__).parents[1] / "model_cards" / "template.md",
)


@dataclass(frozen=True, kw_only=True)
class _About:
    """A mechanism in words for readers of a card."""

    name: str
    explanation: str
    formula: str
    options: str
    source: str


_ABOUT = {
    "expressive": _About(
        name="expressive attention",
        explanation=(
            "Softmax attention gives a key the more weight, the larger its product with the query "
            "is. Expressive attention squares the product: a long key that points along the query, "
            "or against it, gets a weight near 1, a key at a right angle to it none. The weights "
            "of a query are divided by their sum. A mask multiplies a weight by zero."
        ),
        formula=(
            "z_ij = scale · q_i·k_j\n"
            "w_ij = (z_ij²)^power / (1 + (z_ij²)^power)\n"
            "out_i = Σ_j w_ij v_j / Σ_j w_ij"
        ),
        options=(
            "`scale` is a number, `module` for the attention layer's own factor, or `learned` for that "
            "times a learned gain a head. `softmax_layers` and `softmax_heads` count what keeps softmax "
            "attention."
        ),
        source="C. Gros, [arXiv:2407.18601](https://arxiv.org/abs/2407.18601)",
    ),
    "implicit_kernel": _About(
        name="implicit kernel attention",
        explanation=(
            "Softmax attention multiplies a similarity, the RBF kernel of query and key, by a "
            "magnitude, the exponential of the key's squared L2 norm. Implicit kernel attention "
            "keeps this form and changes both: the kernel is built from Fourier features of a "
            "spectral density that can be learned, unless `kernel` is rbf, and the norm is an Lp "
            "norm. The weights of a query are divided by their sum. A mask multiplies a weight by "
            "zero."
        ),
        formula=(
            "K_ij = (φ(q_i)·φ(k_j))² + epsilon, or for rbf exp(-‖q_i - k_j‖² / (2√d))\n"
            "w_ij = K_ij · exp(‖k_j‖_p² / (2√d))\n"
            "out_i = Σ_j w_ij v_j / Σ_j w_ij"
        ),
        options=(
            "`kernel` tells how φ is made, from `num_features` frequencies a density; `p` belongs to "
            "the norm. `softmax_layers` and `softmax_heads` count what keeps softmax attention."
        ),
        source=(
            "K. Song, Y. Jung, D. Kim, I.-C. Moon, AAAI 2021, "
            "[arXiv:2006.06147](https://arxiv.org/abs/2006.06147)"
        ),
    ),
}

#: How the model of a task is loaded; other models by their own class.
_AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
}

_LIMITS = (
    "Every program that runs it must import hf_expressive. Serving engines that replace a model's "
    "attention by their own would compute something else.",
)


def render_card(
    model: PreTrainedModel,
    *,
    results: Mapping[str, Any] | None = None,
    seed: int | None = None,
    name: str | None = None,
    model_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The model card of a variant. What is not known is left out.

    Args:
        model: a model with a mechanism of this package.
        results: the record of the training, as the recipes write it to `results.json`: `task`,
            `runs`, `summary`, and if known `settings` and `environment`. The model's runs are those
            whose `attention` has the model's mechanism and options.
        seed: which of these runs the model is; without it the card gives mean and spread alone.
        name: title of the card. Default: the last part of `model_id`, else model type and mechanism.
        model_id: name on the Hub, or path, for the loading example; without it the example loads the
            folder in which the card lies.
        base_model: Hub name of the model, or models, this one was made from.
        datasets: Hub name of the data set, or data sets, it was trained on.
        license: identifier of its licence on the Hub, e.g. `"apache-2.0"`.
        tags: further tags.

    Returns:
        The card; `card.save(path)` writes it.

    Raises:
        ValueError: the model has no mechanism, or `results` lacks a part, or a run of the model's
            variant (and seed).
        FileNotFoundError: neither the wheel nor the checkout holds the template.
    """
    mechanism = model.config._attn_implementation
    if mechanism not in MECHANISMS:
        raise ValueError(
            f"a card is for a model with one of the mechanisms {', '.join(sorted(MECHANISMS))}, "
            f"but this {type(model).__name__} runs attn_implementation={mechanism!r}; call "
            "hf_expressive.attach(model, config) first."
        )
    config = options_of(model.config, mechanism)
    # A checkpoint remembers the version that wrote it; a model made just now has the installed one.
    options = {**config.to_dict(), **(getattr(model.config, SECTION) or {})}
    version = options.pop("version")
    del options["mechanism"]
    architecture = type(model).__name__
    tag = _pipeline_tag(architecture)
    name = name or (model_id or f"{model.config.model_type}-{mechanism}").rsplit("/", 1)[-1]
    about = _ABOUT[mechanism]
    outcome = None if results is None else _Outcome.read(results, config, seed)

    data = ModelCardData(
        base_model=_listed(base_model),
        library_name="transformers",
        pipeline_tag=tag,
        tags=["hf_expressive", f"{mechanism}-attention", *tags],
        datasets=_listed(datasets),
        license=license,
        model_name=name,
        eval_results=None if outcome is None else outcome.eval_results(),
        metrics=None if outcome is None else [outcome.task["metric"]["type"]],
    )
    if outcome is None:
        del data.model_name  # the Hub knows it as part of the results only
    return ModelCard.from_template(
        data,
        template_path=str(_template()),
        title=name,
        model_id=model_id,
        architecture=architecture,
        auto_class=_AUTO_CLASSES.get(tag or "", architecture),
        parameters=model.num_parameters(),
        about=about,
        options={option: _text(value) for option, value in options.items()},
        softmax_layers=options["softmax_layers"],
        softmax_heads=options["softmax_heads"],
        base_models=_listed(base_model) or [],
        package_version=version,
        outcome=outcome,
        limits=[*(outcome.task.get("limits", ()) if outcome else ()), *_LIMITS],
    )


@dataclass(frozen=True)
class _Outcome:
    """The part of a record that a card tells.

    Attributes:
        task: see `reporting.Record` in the recipes.
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
        seed: int | None,
    ) -> _Outcome:
        missing = [key for key in ("task", "runs", "summary") if key not in results]
        if missing:
            raise ValueError(f"results lacks {', '.join(missing)}; see render_card for its form.")
        runs = [
            run
            for run in results["runs"]
            if run["attention"]["mechanism"] == config.mechanism
            # Read, not compared as it stands: an older record lacks the options that came later.
            and read_section(run["attention"]) == config
        ]
        if not runs:
            raise ValueError(
                f"results holds no run with the attention of this model, {config}; it holds "
                f"{', '.join(results['summary'])}."
            )
        own = None
        if seed is not None:
            own = next((run for run in runs if run["seed"] == seed), None)
            if own is None:
                seeds = ", ".join(str(run["seed"]) for run in runs)
                raise ValueError(f"results holds no run with seed {seed}; the seeds are {seeds}.")
        variant = runs[0]["variant"]
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
                name.replace("_", " "): _text(value)
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


def _template() -> Path:
    for path in _TEMPLATES:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"the model card template is missing: neither {_TEMPLATES[0].name} in the package nor "
        "model_cards/template.md beside it; install hf-expressive again."
    )


def _pipeline_tag(architecture: str) -> str | None:
    """The first task of the Hub that Transformers has the class for."""
    tasks: Mapping[str, Any] = TASK_MAPPING
    for task, classes in tasks.items():
        for names in classes.values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return task
    return None


def _listed(names: str | Sequence[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)


def _number(value: float) -> str:
    return f"{value:.4f}"


def _text(value: object) -> str:
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
