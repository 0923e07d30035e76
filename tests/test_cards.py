"""Model cards: valid metadata, no empty section, every word from the model or its record."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import hf_expressive
from hf_expressive import cards
from hf_expressive.cards import left_out, render_card
from hf_expressive.config import read_section
from hf_expressive.registry import MECHANISMS

REPOSITORY = Path(__file__).parents[1]
MODEL_CARDS = REPOSITORY / "model_cards"

RESULTS: dict[str, Any] = {
    "task": {
        "type": "text-generation",
        "name": "Counting",
        "description": "Say the next number.",
        "dataset": {
            "name": "Numbers",
            "type": "generated",
            "split": "validation",
            "args": {"length": 9},
            "description": "One hundred rows of numbers.",
        },
        "metric": {
            "type": "accuracy",
            "key": "hits",
            "name": "share of hits",
            "description": "Hits by numbers said.",
        },
        "training": "By hand.",
        "limits": ["It counts to nine."],
    },
    "settings": {"learning_rate": 0.002, "seeds": [0, 1], "words": []},
    "runs": [
        {"variant": "sdpa", "attention": {"mechanism": "sdpa"}, "seed": 0, "final": {"hits": 0.5}},
        {
            "variant": "squared",
            "attention": {
                "mechanism": "expressive",
                "version": "0.0.9",
                "softmax_layers": [],
                "softmax_heads": 0,
                "scale": "module",
                "power": 2.0,
            },
            "seed": 0,
            "final": {"hits": 0.875},
        },
    ],
    "summary": {
        "sdpa": {"mean": 0.5, "deviation": None, "low": 0.5, "high": 0.5, "seeds": [0]},
        "squared": {"mean": 0.75, "deviation": 0.125, "low": 0.625, "high": 0.875, "seeds": [0, 1]},
    },
    "environment": {
        "date": "2031-05-06T07:08:09+00:00",
        "versions": {"torch": "9.9.9"},
        "hardware": {"processor": "Abacus 5"},
    },
}


def tiny(config: hf_expressive.ExpressiveConfig | None = None) -> PreTrainedModel:
    options = AutoConfig.for_model(
        "gpt2", vocab_size=7, n_positions=9, n_embd=8, n_layer=2, n_head=2, bos_token_id=None
    )
    options.eos_token_id = None
    model = AutoModelForCausalLM.from_config(options)
    return hf_expressive.attach(model, config or hf_expressive.ExpressiveConfig(power=2.0))


def sections(card: ModelCard) -> dict[str, str]:
    """Heading → body, code blocks kept."""
    parts = re.split(r"^(#+ .*)$", card.text, flags=re.MULTILINE)
    return {
        heading.lstrip("# "): body.strip()
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
    }


CARDS = {
    "bare": {},
    "with results": {"results": RESULTS},
    "with everything": {
        "results": RESULTS,
        "seed": 0,
        "name": "counter",
        "model_id": "me/counter",
        "base_model": "openai-community/gpt2",
        "datasets": ["me/numbers", "me/letters"],
        "license": "mit",
        "tags": ["numbers"],
    },
}


@pytest.mark.parametrize("arguments", CARDS.values(), ids=CARDS.keys())
def test_card_is_whole(arguments: dict[str, Any], tmp_path: Path) -> None:
    card = render_card(tiny(), **arguments)
    for heading, body in sections(card).items():
        assert body, f"section {heading!r} is empty"
    for left_over in ("{{", "{%", "None", "Undefined", "[More Information Needed]", "\n\n\n"):
        assert left_over not in card.text
    assert "\n\n" not in card.text.split("## Limits")[1].strip()
    for table in re.findall(r"(?:^\|.*\n)+", card.text, flags=re.MULTILINE):
        rows = table.splitlines()
        assert len(rows) >= 3, "a table without rows"
        assert len({row.count("|") for row in rows}) == 1

    # The Hub's own reader takes the file, and finds what was written.
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == card.data.to_dict() == metadata_load(tmp_path / "README.md")
    assert read.text == card.text


def test_metadata_says_what_is_known_and_nothing_else() -> None:
    bare = render_card(tiny()).data.to_dict()
    assert bare == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_expressive", "expressive-attention"],
    }
    full = render_card(tiny(), **CARDS["with everything"]).data
    assert full.base_model == ["openai-community/gpt2"]
    assert full.datasets == ["me/numbers", "me/letters"]
    assert full.license == "mit"
    assert full.tags == ["hf_expressive", "expressive-attention", "numbers"]
    assert full.metrics == ["accuracy"]
    assert full.model_name == "counter"


def test_model_index_holds_the_results() -> None:
    index = render_card(tiny(), results=RESULTS, seed=0).data.to_dict()["model-index"]
    assert index == [
        {
            "name": "gpt2-expressive",
            "results": [
                {
                    "task": {"type": "text-generation", "name": "Counting"},
                    "dataset": {
                        "name": "Numbers",
                        "type": "generated",
                        "split": "validation",
                        "args": {"length": 9},
                    },
                    "metrics": [
                        {"type": "accuracy", "value": 0.875, "name": "share of hits"},
                        {
                            "type": "accuracy",
                            "value": 0.75,
                            "name": "share of hits, mean of the runs with seeds 0, 1",
                        },
                    ],
                }
            ],
        }
    ]
    without_seed = render_card(tiny(), results=RESULTS).data.eval_results
    assert [result.metric_value for result in without_seed] == [0.75]


def test_text_tells_the_record() -> None:
    found = sections(render_card(tiny(), results=RESULTS, seed=0))
    assert found["Data"] == "Say the next number.\n\nOne hundred rows of numbers."
    assert found["Training"].startswith("By hand.\n\n| setting |")
    assert "| learning rate | 0.002 |" in found["Training"]
    assert "| seeds | 0, 1 |" in found["Training"]
    assert "| words | none |" in found["Training"]
    assert "| sdpa | 0.5000 | 0.5000 | 0.5000 | 0 |" in found["Results"]
    assert "| squared (this model) | 0.7500 ± 0.1250 | 0.6250 | 0.8750 | 0, 1 |" in found["Results"]
    assert "the run with seed 0, share of hits 0.8750." in found["Results"]
    assert "Measured on 2031-05-06, with torch 9.9.9, on Abacus 5." in found["Results"]
    assert found["Limits"].startswith("- It counts to nine.\n- ")


@pytest.mark.parametrize("part", ["settings", "environment"])
def test_missing_parts_of_the_record_are_left_out(part: str) -> None:
    results = {key: value for key, value in RESULTS.items() if key != part}
    found = sections(render_card(tiny(), results=results, seed=0))
    assert ("Training" in found) == (part != "settings")
    assert ("Measured" in found["Results"]) == (part != "environment")


def test_card_describes_the_options() -> None:
    plain = render_card(tiny(hf_expressive.ExpressiveConfig(scale=0.5))).text
    assert "| `scale` | 0.5 |" in plain
    assert "| `power` | 1 |" in plain
    assert "takes the place of softmax attention.\n" in plain


@pytest.mark.parametrize(
    ("hybrid", "words"),
    [
        ({"softmax_layers": (1,)}, "except in layer 1."),
        ({"softmax_layers": (0, 1)}, "except in layers 0, 1."),
        ({"softmax_heads": 1}, "except in 1 head of every layer."),
        ({"softmax_heads": 2}, "except in 2 heads of every layer."),
        (
            {"softmax_layers": (0,), "softmax_heads": 2},
            "except in layer 0 and in 2 heads of the others.",
        ),
    ],
)
def test_card_tells_where_softmax_remains(hybrid: dict[str, Any], words: str) -> None:
    text = render_card(tiny(hf_expressive.ExpressiveConfig(**hybrid))).text
    assert f"takes the place of softmax attention, {words}\n" in text


def test_card_tells_the_version_that_saved_the_model() -> None:
    model = tiny()
    assert f"Saved with hf_expressive {hf_expressive.__version__}." in render_card(model).text
    model.config.hf_expressive = {**model.config.hf_expressive, "version": "0.0.7"}
    assert "Saved with hf_expressive 0.0.7." in render_card(model).text


def test_loading_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    text = render_card(model).text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["model"]) is type(model)
    assert names["model"].config._attn_implementation == "expressive"
    assert 'from_pretrained("me/counter")' in render_card(model, model_id="me/counter").text


SMALL: dict[str, Any] = {
    "vocab_size": 7,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def test_models_outside_the_auto_classes_are_loaded_by_their_class() -> None:
    model = CLIPTextModelWithProjection(CLIPTextConfig(**SMALL))
    card = render_card(hf_expressive.attach(model, hf_expressive.ExpressiveConfig()))
    assert "pipeline_tag" not in card.data.to_dict()
    assert 'CLIPTextModelWithProjection.from_pretrained(".")' in card.text


def test_record_tells_the_task_where_the_class_does_not() -> None:
    """The same class translates and summarises; alone it gets no task, and no wrong one."""
    config = BartConfig(
        vocab_size=7, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
        decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model = hf_expressive.attach(
        BartForConditionalGeneration(config), hf_expressive.ExpressiveConfig(power=2.0)
    )
    assert 'AutoModelForSeq2SeqLM.from_pretrained(".")' in render_card(model).text
    assert "pipeline_tag" not in render_card(model).data.to_dict()
    results = copy.deepcopy(RESULTS)
    results["task"]["type"] = "translation"
    assert render_card(model, results=results).data.pipeline_tag == "translation"


def test_relation_to_the_base_model() -> None:
    card = render_card(tiny(), base_model="gpt2", base_model_relation="finetune")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    for wrong in (
        {"base_model": "gpt2", "base_model_relation": "cousin"},
        {"base_model_relation": "finetune"},
    ):
        with pytest.raises(ValueError, match="base_model_relation must be one of finetune"):
            render_card(tiny(), **wrong)


def test_author_is_told_what_is_unknown() -> None:
    bare = left_out(render_card(tiny()))
    for word in ("license", "base_model,", "datasets", "language", "results"):
        assert any(word in said for said in bare), word
    assert not any("pipeline_tag" in said or "relation" in said for said in bare)
    assert any("relation" in said for said in left_out(render_card(tiny(), base_model="gpt2")))
    assert not left_out(
        render_card(
            tiny(), **CARDS["with everything"], base_model_relation="finetune", language="en"
        )
    )


def with_card(**told: Any) -> dict[str, Any]:
    """The record with its part on the card, and the size of the model in its runs."""
    results = copy.deepcopy(RESULTS)
    results["card"] = {"architecture": "GPT2LMHeadModel", **told}
    results["runs"][1]["parameters"] = tiny().num_parameters()
    results["runs"][1]["attention"]["version"] = hf_expressive.__version__
    return results


def test_record_alone_gives_the_same_card_as_the_model() -> None:
    told = {"name": "counter", "model_id": "me/counter", "license": "mit", "base_model": "gpt2"}
    results = with_card(variant="squared", seed=0, **told)
    assert f"{render_card(results=results)}" == f"{render_card(tiny(), results=results, seed=0)}"
    by_arguments = render_card(results=with_card(), variant="squared", seed=0, **told)
    assert f"{by_arguments}" == f"{render_card(results=results)}"


def test_record_that_does_not_tell_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks card\.architecture"):
        render_card(results=RESULTS)
    with pytest.raises(ValueError, match="a card needs a model"):
        render_card()
    with pytest.raises(ValueError, match="holds no run for variant='sdpa'"):
        render_card(results=with_card(), variant="sdpa")


def test_several_variants_with_one_attention_are_told_apart_by_name() -> None:
    """For example before and after fine-tuning."""
    results = with_card()
    later = copy.deepcopy(results["runs"][1])
    results["runs"].append({**later, "variant": "tuned", "final": {"hits": 1.0}})
    results["summary"]["tuned"] = {**results["summary"]["sdpa"], "mean": 1.0}
    for subject in ({"model": tiny()}, {}):
        with pytest.raises(ValueError, match=r"squared, tuned.*variant"):
            render_card(**subject, results=results)
        card = render_card(**subject, results=results, variant="tuned", seed=0)
        assert card.data.eval_results[0].metric_value == 1.0
        assert "| tuned (this model) |" in card.text
    with pytest.raises(ValueError, match="of the variant 'sdpa'"):
        render_card(tiny(), results=results, variant="sdpa")


def published() -> list[Path]:
    """Cards of trained variants."""
    found = sorted(MODEL_CARDS.glob("*.md"))
    return [path for path in found if path.name not in ("template.md", "architectures.md")]


def records() -> dict[str, Path]:
    """Published records by the name of their card."""
    found = {}
    for path in sorted((REPOSITORY / "recipes" / "results").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8")).get("card")
        if told and "name" in told:
            found[told["name"]] = path
    return found


def test_every_published_card_has_a_record_and_every_such_record_a_card() -> None:
    cards, found = {path.stem for path in published()}, records()
    missing = [str(found[name].relative_to(REPOSITORY)) for name in found.keys() - cards]
    assert not missing, f"hf-expressive card {missing[0]} --output model_cards"
    assert not cards - found.keys(), "cards without a record of their name"


#: Models of the published cards' classes, small: what a card's code loads is not on any Hub.
STAND_INS = {
    "GPT2LMHeadModel": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=2)
    ),
    "BertModel": lambda: BertModel(BertConfig(**SMALL)),
}


@pytest.mark.parametrize("path", published(), ids=lambda path: path.stem)
def test_published_card(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what its record gives today, the Hub's reader takes it, and its code runs."""
    record = records()[path.stem]
    results = json.loads(record.read_text(encoding="utf-8"))
    card = render_card(results=results)
    assert path.read_text(encoding="utf-8") == f"{card}", (
        f"out of date: hf-expressive card {record.relative_to(REPOSITORY)} --output model_cards"
    )
    assert metadata_load(path) == card.data.to_dict()
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    (loaded,) = re.findall(r'from_pretrained\("(.*?)"\)', code)
    attention = next(
        run["attention"] for run in results["runs"] if run["variant"] == results["card"]["variant"]
    )
    options = read_section(attention)
    stand_in = STAND_INS[results["card"]["architecture"]]()
    hf_expressive.attach(stand_in, dataclasses.replace(options, softmax_layers=(), softmax_heads=0))
    stand_in.save_pretrained(loaded)
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == results["card"]["architecture"]
    assert names["model"].config._attn_implementation == attention["mechanism"]


@pytest.mark.parametrize("mechanism", sorted(MECHANISMS))
def test_every_mechanism_has_a_card(mechanism: str) -> None:
    card = render_card(tiny(MECHANISMS[mechanism].config()))
    assert f"{mechanism}-attention" in card.data.tags
    body = sections(card)["Attention"]
    assert "Source: " in body
    for option in MECHANISMS[mechanism].config().to_dict().keys() - {"mechanism", "version"}:
        assert f"| `{option}` |" in body


def test_softmax_model_gets_no_card() -> None:
    model = hf_expressive.detach(tiny())
    with pytest.raises(ValueError, match=r"runs attn_implementation='sdpa'; call hf_expressive"):
        render_card(model)


def test_record_from_before_an_option_existed_is_understood() -> None:
    results = copy.deepcopy(RESULTS)
    del results["runs"][1]["attention"]["softmax_heads"]
    assert "seed 0, share of hits 0.8750" in render_card(tiny(), results=results, seed=0).text


def test_results_of_another_variant_are_refused() -> None:
    with pytest.raises(ValueError, match="no run with the attention of this model"):
        render_card(tiny(hf_expressive.ExpressiveConfig(power=3.0)), results=RESULTS)
    with pytest.raises(ValueError, match="no run with seed 5; the seeds are 0"):
        render_card(tiny(), results=RESULTS, seed=5)
    incomplete = copy.deepcopy(RESULTS)
    del incomplete["summary"], incomplete["task"]
    with pytest.raises(ValueError, match="results lacks task, summary"):
        render_card(tiny(), results=incomplete)


def test_template_is_where_the_wheel_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    package = REPOSITORY / "hf_expressive"
    assert [REPOSITORY / path for path in included.values()] == [cards._TEMPLATES[0]]
    assert [REPOSITORY / path for path in included] == [cards._TEMPLATES[1]]
    assert cards._TEMPLATES[0].parent == package
    monkeypatch.setattr(cards, "_TEMPLATES", (package / "nowhere.md",))
    with pytest.raises(FileNotFoundError, match=r"neither nowhere\.md in the package"):
        render_card(tiny())
