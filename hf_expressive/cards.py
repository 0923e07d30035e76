"""Model cards: what a variant is, how to load it, how it was trained, what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .config import SECTION, MechanismConfig, read_section
from .outcomes import Outcome, check_parts, text_of
from .registry import MECHANISMS, options_of

#: Where the template lies: beside this file in an installed wheel, in `model_cards/` of a checkout.
_TEMPLATES = (
    Path(__file__).parent / "model_card_template.md",
    Path(__file__).parents[1] / "model_cards" / "template.md",
)


#: The Auto classes, the more telling first: their table of models and, where the class alone tells it,
#: the task that the Hub lists such models under.
_AUTO_CLASSES: dict[str, tuple[Mapping[str, Any], str | None]] = {
    "AutoModelForCausalLM": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "text-generation"),
    "AutoModelForSeq2SeqLM": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, None),
    "AutoModelForMaskedLM": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "fill-mask"),
    "AutoModelForSequenceClassification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "text-classification",
    ),
    "AutoModelForTokenClassification": (
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "token-classification",
    ),
    "AutoModelForQuestionAnswering": (
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "question-answering",
    ),
    "AutoModelForImageClassification": (
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "image-classification",
    ),
    "AutoModelForSpeechSeq2Seq": (
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "automatic-speech-recognition",
    ),
    "AutoModelForImageTextToText": (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "image-text-to-text",
    ),
    "AutoModel": (modeling_auto.MODEL_MAPPING_NAMES, None),
}

_LIMITS = (
    "Every program that runs it must import hf_expressive. Plain Transformers refuses it, and so do "
    "serving engines that choose their own code by the `architectures` of its config.json, a name that "
    "only hf_expressive knows. One that goes by `model_type` alone would compute something else.",
)

#: How a model derives from its base model, in the Hub's words.
RELATIONS = ("finetune", "adapter", "merge", "quantized")

#: What an author may know that a card lacks: keys of the metadata, and what to say of them.
_WANTED = {
    "license": "license",
    "base_model": "base_model, if it was made from another model",
    "base_model_relation": f"base_model_relation ({', '.join(RELATIONS)})",
    "datasets": "datasets, if it was trained on some of the Hub",
    "language": "language, if it is about one",
    "pipeline_tag": "pipeline_tag, the Hub's name of the task",
    "model-index": "results of an evaluation",
}


def render_card(
    model: PreTrainedModel | None = None,
    *,
    results: Mapping[str, Any] | None = None,
    variant: str | None = None,
    seed: int | None = None,
    name: str | None = None,
    model_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    base_model_relation: str | None = None,
    datasets: str | Sequence[str] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The model card of a variant. What is not known is left out; `left_out` lists it.

    Args:
        model: a model with a mechanism of this package. Without it everything comes from `results`,
            whose part `card` then tells the `architecture`, the class of the model.
        results: the record of the training, as the recipes write it to `results.json`: `task`,
            `runs`, `summary`, and if known `settings`, `environment` and `card`. The model's runs are
            those whose `attention` has the model's mechanism and options. `card` holds values for the
            arguments below that are not given, but `variant` and `seed` only where `model` is not.
        variant: which of the record's variants the model is, where several have its attention.
        seed: which of these runs the model is; without it the card gives mean and spread alone.
        name: title of the card. Default: the last part of `model_id`, else model type and mechanism.
        model_id: name on the Hub, or path, for the loading example; without it the example loads the
            folder in which the card lies.
        base_model: Hub name of the model, or models, this one was made from.
        base_model_relation: how: `"finetune"`, `"adapter"`, `"merge"` or `"quantized"`.
        datasets: Hub name of the data set, or data sets, it was trained on.
        language: ISO 639 code of the language, or languages, it is about.
        license: identifier of its licence on the Hub, e.g. `"apache-2.0"`.
        tags: further tags.

    Returns:
        The card; `card.save(path)` writes it.

    Raises:
        ValueError: the model has no mechanism, or `results` lacks a part, or a run of the model's
            variant (and seed), or holds several variants that fit.
        FileNotFoundError: neither the wheel nor the checkout holds the template.
    """
    told: dict[str, Any] = dict((results or {}).get("card", {}))
    if model is None:
        if results is None:
            raise ValueError("a card needs a model, or results= with the part `card`.")
        variant = variant or told.get("variant")
        seed = told.get("seed") if seed is None else seed
        subject = _Subject.of_record(results, variant)
    else:
        subject = _Subject.of_model(model)
    outcome = None if results is None else Outcome.read(results, subject.config, variant, seed)
    name = name or told.get("name")
    model_id = model_id or told.get("model_id")
    base_models = _listed(base_model or told.get("base_model"))
    relation = base_model_relation or told.get("base_model_relation")
    if relation is not None and (relation not in RELATIONS or not base_models):
        raise ValueError(
            f"base_model_relation must be one of {', '.join(RELATIONS)} and goes with base_model; got "
            f"{relation!r} with base_model={base_model!r}."
        )

    mechanism = subject.config.mechanism
    auto_class, task = _loader(subject.architecture)
    if outcome is not None:
        # The class alone does not tell translation from summarisation; the record does.
        task = outcome.task["type"]
    name = name or (model_id or f"{subject.kind}-{mechanism}").rsplit("/", 1)[-1]
    about = MECHANISMS[mechanism].module.about
    options = subject.config.to_dict()
    del options["version"], options["mechanism"]

    data = ModelCardData(
        base_model=base_models,
        base_model_relation=relation,
        library_name="transformers",
        pipeline_tag=task,
        tags=["hf_expressive", f"{mechanism}-attention", *told.get("tags", ()), *tags],
        datasets=_listed(datasets or told.get("datasets")),
        language=_listed(language or told.get("language")),
        license=license or told.get("license"),
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
        architecture=subject.architecture,
        auto_class=auto_class,
        parameters=subject.parameters,
        about=about,
        options={option: text_of(value) for option, value in options.items()},
        softmax_layers=options["softmax_layers"],
        softmax_heads=options["softmax_heads"],
        base_models=base_models or [],
        package_version=subject.version,
        outcome=outcome,
        limits=[*(outcome.task.get("limits", ()) if outcome else ()), *_LIMITS],
    )


def left_out(card: ModelCard) -> list[str]:
    """What the metadata of a card does not say, for its author to add where it is known."""
    data = card.data.to_dict()
    return [
        said
        for key, said in _WANTED.items()
        if key not in data and (key != "base_model_relation" or "base_model" in data)
    ]


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """The model that a card is about.

    Attributes:
        architecture: its class.
        kind: its model type, or its class where the model itself is not at hand.
        parameters: how many it has.
        config: mechanism and options.
        version: of this package, when it was saved.
    """

    architecture: str
    kind: str
    parameters: int
    config: MechanismConfig
    version: str

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self:
        mechanism = model.config._attn_implementation
        if mechanism not in MECHANISMS:
            raise ValueError(
                f"a card is for a model with one of the mechanisms {', '.join(sorted(MECHANISMS))}, "
                f"but this {type(model).__name__} runs attn_implementation={mechanism!r}; call "
                "hf_expressive.attach(model, config) first."
            )
        config = options_of(model.config, mechanism)
        # A checkpoint remembers the version that wrote it; a model made just now has the installed one.
        section = getattr(model.config, SECTION) or config.to_dict()
        return cls(
            architecture=type(model).__name__,
            kind=model.config.model_type,
            parameters=model.num_parameters(),
            config=config,
            version=section.get("version") or config.to_dict()["version"],
        )

    @classmethod
    def of_record(cls, results: Mapping[str, Any], variant: str | None) -> Self:
        check_parts(results)
        architecture = results.get("card", {}).get("architecture")
        if architecture is None:
            raise ValueError(
                "results lacks card.architecture, the class of the model, e.g. GPT2LMHeadModel; add it, "
                "or render the card from the model itself."
            )
        runs = {
            run["variant"]: run
            for run in results["runs"]
            if run["attention"]["mechanism"] in MECHANISMS and variant in (None, run["variant"])
        }
        if len(runs) != 1:
            raise ValueError(
                f"results holds {', '.join(runs) or 'no run'} for variant={variant!r}; name one of its "
                f"variants with a mechanism of this package; it holds {', '.join(results['summary'])}."
            )
        (run,) = runs.values()
        config = read_section(run["attention"])
        return cls(
            architecture=architecture,
            kind=architecture,
            parameters=run["parameters"],
            config=config,
            version=run["attention"].get("version") or config.to_dict()["version"],
        )


def _template() -> Path:
    for path in _TEMPLATES:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"the model card template is missing: neither {_TEMPLATES[0].name} in the package nor "
        "model_cards/template.md beside it; install hf-expressive again."
    )


def _loader(architecture: str) -> tuple[str, str | None]:
    """The class that loads a model, if possible an Auto class, and its task if the class tells it."""
    for auto_class, (table, task) in _AUTO_CLASSES.items():
        for names in table.values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return auto_class, task
    return architecture, None


def _listed(names: str | Sequence[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)
