"""Fine-tuning: adapters that know their base, whole runs for text and classes, refusals."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import RECIPES
from peft import PeftModel
from tiny import llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from hf_expressive import ExpressiveConfig, attach

sys.path.insert(0, str(RECIPES))

import adapters
import finetune as recipe
from classify import byte_tokenizer as classifier_tokenizer
from text import byte_tokenizer

OPTIONS = ExpressiveConfig(scale="learned", sink=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant with random weights and a byte tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    attach(llama(vocab_size=257), OPTIONS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict[str, Any]:
    """The recipe in this process; its results."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    command = ["finetune.py", "--output_dir", str(folder), *options]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "12", "--evaluate_every", "6"])
    recipe.main()
    return json.loads((folder / "results.json").read_text())


def text_options(base: Path, tmp_path: Path) -> list[str]:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"story {number}: " + "round and round " * 12)
    return [
        *("--checkpoint", str(base), "--train_files", str(tmp_path / "*.txt"), "--length", "32"),
        *("--validation_documents", "3", "--batch_size", "4", "--warmup_steps", "2"),
    ]


def losses(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([list(b"story 5: round and round")])
    return model(input_ids=ids, labels=ids).loss.detach()


def test_adapter_carries_the_mechanism_and_knows_its_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    options = text_options(base, tmp_path)
    found = run(monkeypatch, folder, *options, "--learning_rate", "1e-2")
    curve = found["runs"][0]["curve"]["loss"]
    assert curve[-1] < curve[0] - 0.1
    assert {path.name for path in folder.iterdir()} == {
        "settings.json", "results.json", "loss.png", "adapter",
    }  # fmt: skip
    adapter = folder / "adapter"

    # PEFT alone refuses it, whatever the base is.
    plain = llama(vocab_size=257, attn_implementation="sdpa")
    with pytest.raises(Exception, match=adapters.KIND):
        PeftModel.from_pretrained(plain, str(adapter))
    with pytest.raises(ValueError, match=r"belongs on a base with expressive .* runs softmax"):
        adapters.load_adapter(plain, adapter)
    other = attach(llama(vocab_size=257), ExpressiveConfig(power=2.0))
    with pytest.raises(ValueError, match=r"scale=learned.* runs expressive \(.*power=2\.0"):
        adapters.load_adapter(other, adapter)

    tuned = adapters.load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    sinks = [
        p for name, p in tuned.named_parameters() if "modules_to_save" in name and "sink" in name
    ]
    assert len(sinks) == 2
    assert all((sink != 0).all() for sink in sinks), "the sinks were not trained, or not saved"
    untuned = AutoModelForCausalLM.from_pretrained(base)
    assert losses(tuned) < losses(untuned) - 0.1

    merged = tmp_path / "merged"
    run(monkeypatch, merged, *options, "--learning_rate", "1e-2", "--merge")
    whole = AutoModelForCausalLM.from_pretrained(merged / "model")
    assert whole.config._attn_implementation == "expressive"
    torch.testing.assert_close(losses(whole), losses(tuned), atol=1e-4, rtol=1e-4)


def test_adapter_of_a_softmax_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = adapters.add_adapter(llama(attn_implementation="sdpa"), target_modules="all-linear")
    adapters.save_adapter(model, tmp_path)
    again = PeftModel.from_pretrained(llama(attn_implementation="sdpa"), str(tmp_path))
    assert again.peft_config["default"].peft_type == "LORA"
    with pytest.raises(ValueError, match="belongs on a base with softmax attention"):
        adapters.load_adapter(attach(llama(), OPTIONS), tmp_path)


def test_all_weights_for_classes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is new, the mechanism is put on a base that had another."""
    folder, table = tmp_path / "out", tmp_path / "table.csv"
    start = tmp_path / "start"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(start)
    classifier_tokenizer().save_pretrained(start)
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([("aaaa" * (i % 5 + 1), "a") for i in range(40)])
        rows.writerows([("bbbb" * (i % 5 + 1), "b") for i in range(40)])
    options = [
        *("--task", "classification", "--checkpoint", str(start), "--train_file", str(table)),
        *("--method", "full", "--learning_rate", "1e-2", "--attention", "expressive:scale=learned"),
    ]
    found = run(monkeypatch, folder, *options)
    assert found["runs"][0]["final"]["accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert model.config.hf_expressive["sink"] is False
    assert sorted(model.config.label2id) == ["a", "b"]


def test_four_bits_need_a_gpu(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="4-bit weights on a GPU only; on a CPU take --quantize"):
        run(monkeypatch, tmp_path, *text_options(base, tmp_path), "--quantize", "bnb4")
    assert not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize("kind", ["bnb8", "torchao8"])
def test_quantised_bases_learn_and_take_their_adapter(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, folder = tmp_path / "start", tmp_path / "out"
    attach(llama(vocab_size=257), OPTIONS).save_pretrained(start)
    byte_tokenizer().save_pretrained(start)
    options = text_options(start, tmp_path)
    found = run(monkeypatch, folder, *options, "--learning_rate", "1e-2", "--quantize", kind)
    curve = found["runs"][0]["curve"]["loss"]
    assert curve[-1] < curve[0] - 0.1

    given = recipe.load_options(recipe.FineTuneOptions(checkpoint=str(start), quantize=kind))
    quantised = AutoModelForCausalLM.from_pretrained(start, **given)
    full = AutoModelForCausalLM.from_pretrained(start)
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (full, quantised)]
    assert [type(weight) is torch.nn.Parameter for weight in weights] == [True, False]
    before = losses(quantised)
    torch.testing.assert_close(before, losses(full), atol=0.5, rtol=0.0)
    assert losses(adapters.load_adapter(quantised, folder / "adapter")) < before - 0.1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"checkpoint": ""}, "--checkpoint is needed"),
        ({"lora_rank": 0}, "--lora_rank must be at least 1"),
        ({"attention": "soft"}, "--attention must be one of"),
        ({"quantize": "bnb4", "method": "full"}, "take --method lora"),
        ({"quantize": "bnb4", "merge": True}, "leave out --quantize"),
    ],
)
def test_bad_options_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe.FineTuneOptions(**{"checkpoint": "x", **values})


@pytest.mark.parametrize("kind", ["bnb4", "torchao8"])
def test_missing_package_for_quantised_weights_is_named(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"needs the package {recipe._PACKAGES[kind]}"):
        recipe.FineTuneOptions(checkpoint="x", quantize=kind)
