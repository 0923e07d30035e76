"""The classification recipe: metric, data, tokens, models of many architectures, a whole run."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from launching import RECIPES, TWO, launch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(RECIPES))

import classify as recipe
import loop
import supervised
from arguments import Attention
from reporting import Record


def write(path: Path, rows: list[tuple[str, str]], columns: tuple[str, str]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def colours(count: int, seed: int) -> list[tuple[str, str]]:
    """Letters with one x or y among them; the x is red, the y is green."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        letters = generator.choice(list("abcd"), size=generator.integers(4, 9))
        letters[generator.integers(len(letters))] = mark = generator.choice(["x", "y"])
        rows.append(("".join(letters), {"x": "red", "y": "green"}[mark]))
    return rows


def task(folder: Path, **model: object) -> recipe.Classification:
    data = supervised.DataOptions(
        train_file=write(folder / "train.csv", colours(30, 0), ("text", "label")),
        validation_file=write(folder / "validation.csv", colours(11, 1), ("text", "label")),
        max_length=12,
    )
    options = recipe.ModelOptions(**{"width": 16, "layers": 1, "heads": 2, **model})
    return recipe.Classification(data, recipe.ColumnOptions(), options)


# ---- metric --------------------------------------------------------------------------------------


def test_metric_agrees_with_a_hand_count() -> None:
    metric = evaluate.load(recipe.METRIC, keep_in_memory=True)
    metric.add_batch(predictions=[0, 0, 0], references=[0, 0, 1])
    metric.add_batch(predictions=[1, 1, 3], references=[1, 2, 0])
    # F1: class 0 right 2 of 3 predicted, 3 true; 1: 1 of 2, 2; 2: 0 of 0, 1; 3: 0 of 1, 0.
    found = metric.compute()
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1"] == pytest.approx((4 / 6 + 2 / 4 + 0 + 0) / 4)


# ---- data ----------------------------------------------------------------------------------------


def test_files_of_both_kinds_hold_the_same_splits(tmp_path: Path) -> None:
    rows = colours(20, 0)
    table = write(tmp_path / "train.csv", rows, ("text", "label"))
    lines = tmp_path / "train.jsonl"
    lines.write_text("".join(json.dumps({"label": b, "id": 1, "text": a}) + "\n" for a, b in rows))
    splits = [
        supervised.read_splits(supervised.DataOptions(train_file=str(path)), ["text", "label"])
        for path in (table, lines)
    ]
    assert {name: len(part) for name, part in splits[0].items()} == {"train": 18, "validation": 2}
    for name in ("train", "validation"):
        assert splits[0][name].to_list() == splits[1][name].to_list()
    everything = [tuple(row.values()) for part in splits[0].values() for row in part]
    assert sorted(everything) == sorted(rows)


def test_columns_are_found_inside_dictionaries() -> None:
    split = Dataset.from_list([{"translation": {"de": "ja", "en": "yes"}, "id": 7}])
    assert supervised._pick(split, ["en", "de"]).to_list() == [{"en": "yes", "de": "ja"}]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "give either --dataset or --train_file"),
        ({"dataset": "a", "train_file": "b.csv"}, "give either --dataset or --train_file"),
        ({"dataset": "a", "validation_file": "b.csv"}, "--validation_file goes with --train_file"),
        ({"dataset": "a", "max_length": 1}, "--max_length must be at least 2, got 1"),
        ({"train_file": "a.csv", "validation_share": 0.0}, "--validation_share must be between"),
    ],
)
def test_bad_data_options_are_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        supervised.DataOptions(**values)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "train.csv", colours(20, 0), ("text", "label"))
    for path, columns, sentence in (
        ("train.txt", ["text"], "must end in .csv, .json, .jsonl"),
        (str(tmp_path / "none.csv"), ["text"], "is no file"),
        (table, ["texts"], "no column texts; it has text, label"),
    ):
        with pytest.raises(ValueError, match=sentence):
            supervised.read_splits(supervised.DataOptions(train_file=path), columns)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"warmup_steps": -1}, "--warmup_steps must be at least 0"),
        ({"weight_decay": -0.1}, "--weight_decay must be at least 0"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm must be"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"seeds": [2, 2]}, "--seeds must be different numbers"),
        ({"attention": ["expressive:pow=2"]}, "unknown option pow"),
    ],
)
def test_bad_training_options_are_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        supervised.TrainingOptions(**values)


def test_bad_models_and_trackers_are_refused() -> None:
    with pytest.raises(ValueError, match="--heads must divide --width, which is 128; got 3"):
        recipe.ModelOptions(heads=3)
    with pytest.raises(ValueError, match="--architecture marian has no model for sequence"):
        recipe.ModelOptions(architecture="marian")
    with pytest.raises(ValueError, match="--report_to must be one of none, all"):
        supervised.OutputOptions(report_to="paper")


def splits(train: list[object], validation: list[object], kind: object) -> DatasetDict:
    features = Features({"label": kind})
    return DatasetDict(
        {
            name: Dataset.from_dict({"label": labels}, features=features)
            for name, labels in (("train", train), ("validation", validation))
        }
    )


def test_classes_are_those_of_the_data() -> None:
    words, numbers = Value("string"), Value("int64")
    assert recipe.class_names(splits(["b", "a", "b"], ["a"], words), "label") == ["a", "b"]
    assert recipe.class_names(splits([10, 9], [9], numbers), "label") == ["9", "10"]
    named = ClassLabel(names=["no", "yes", "maybe"])
    assert recipe.class_names(splits([1, 0], [1], named), "label") == ["no", "yes", "maybe"]
    with pytest.raises(ValueError, match="only the class 'a'"):
        recipe.class_names(splits(["a"], ["a"], words), "label")
    with pytest.raises(ValueError, match="a label of the validation data is missing"):
        recipe.class_names(splits(["a", "b"], [None], words), "label")


def test_texts_become_tokens_and_classes(tmp_path: Path) -> None:
    made = task(tmp_path)
    assert made.labels == ["green", "red"]
    text, label = colours(30, 0)[3]
    row = made.splits["train"][3]
    assert row["label"] == made.labels.index(label)
    assert made.tokenizer.decode(row["input_ids"], skip_special_tokens=True) == text
    batch = made.collate([made.splits["train"][i] for i in range(4)])
    lengths = [len(made.splits["train"][i]["input_ids"]) for i in range(4)]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["input_ids"].shape == (4, max(lengths))
    assert len(set(lengths)) > 1


def test_a_class_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    data = supervised.DataOptions(
        train_file=write(tmp_path / "train.csv", colours(30, 0), ("text", "label")),
        validation_file=write(tmp_path / "new.csv", [("abc", "blue")], ("text", "label")),
    )
    with pytest.raises(ValueError, match="has the class 'blue', which the training data has not"):
        recipe.Classification(data, recipe.ColumnOptions(), recipe.ModelOptions())


def test_byte_tokenizer_has_a_token_a_byte(tmp_path: Path) -> None:
    recipe.byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 3 + 256
    text = "  Größe\n→ 漢"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 2 + len(text.encode())
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", ["bert", "distilbert", "roberta", "modernbert", "gpt2", "llama"]
)
def test_any_architecture_is_built_and_pads_without_a_trace(
    tmp_path: Path, architecture: str
) -> None:
    made = task(tmp_path, architecture=architecture)
    model = made.build(Attention.parse("expressive:scale=2")).eval()
    assert model.config.model_type == architecture
    assert model.config._attn_implementation == "expressive"
    assert model.config.hf_expressive["scale"] == 2.0
    assert model.config.id2label == {0: "green", 1: "red"}
    rows = sorted(made.splits["train"], key=lambda row: len(row["input_ids"]))
    short, long = rows[0], {**rows[-1], "input_ids": list(range(1, 13))}
    with torch.no_grad():
        alone = made._logits(model, made.collate([short]))
        together = made._logits(model, made.collate([long, short]))
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)


def test_checkpoint_keeps_its_weights_and_gets_the_mechanism(tmp_path: Path) -> None:
    made = task(tmp_path)
    stock = made.build(Attention.parse("sdpa"))
    stock.save_pretrained(tmp_path / "stock")
    made.tokenizer.save_pretrained(tmp_path / "stock")
    again = task(tmp_path, checkpoint=str(tmp_path / "stock"))
    assert again.base_model == str(tmp_path / "stock")
    model = again.build(Attention.parse("expressive:power=2"))
    assert model.config._attn_implementation == "expressive"
    assert model.config.hf_expressive["power"] == 2.0
    assert model.config.label2id == {"green": 0, "red": 1}
    for name, weight in stock.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_weight_decay_spares_biases_norms_and_mechanisms(tmp_path: Path) -> None:
    model = task(tmp_path).build(Attention.parse("implicit_kernel:kernel=direct"))
    decayed, kept = loop.parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    free = {names[id(parameter)] for parameter in kept["params"]}
    assert {name for name in names.values() if name.endswith("bias")} <= free
    assert {name for name in names.values() if ".mechanism." in name} <= free
    assert any(".mechanism." in name for name in free)
    assert "bert.encoder.layer.0.intermediate.dense.weight" not in free
    assert not any(name.endswith("LayerNorm.weight") for name in set(names.values()) - free)


def test_measurement_is_that_of_the_logits(tmp_path: Path) -> None:
    made = task(tmp_path)
    model = made.build(Attention.parse("sdpa")).eval()
    rows = list(made.splits["validation"])
    with torch.no_grad():
        logits = torch.cat([made._logits(model, made.collate([row])) for row in rows]).tolist()
        found = made.measure(Accelerator(cpu=True), model, made.loader("validation", 4))
    right = [max(range(2), key=row.__getitem__) for row in logits]
    labels = [row["label"] for row in rows]
    assert found["accuracy"] == sum(a == b for a, b in zip(right, labels, strict=True)) / 11
    by_hand = [
        math.log(sum(map(math.exp, row))) - row[label]
        for row, label in zip(logits, labels, strict=True)
    ]
    assert found["loss"] == pytest.approx(sum(by_hand) / 11, rel=1e-4)
    majority = max(labels.count(0), labels.count(1)) / 11
    assert made.describe()["metric"]["chance"] == majority


# ---- a whole run ---------------------------------------------------------------------------------

TRAINING = [
    *("--text_column", "marks", "--label_column", "colour", "--max_length", "12"),
    *("--width", "16", "--layers", "1", "--heads", "2"),
    *("--steps", "60", "--batch_size", "24", "--gradient_accumulation_steps", "2"),
    *("--evaluate_every", "30", "--learning_rate", "1e-2", "--warmup_steps", "5"),
    *("--seeds", "3", "--attention", "sdpa", "expressive:scale=learned"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """Output folder, terminal output and options of a run in two processes."""
    folder = tmp_path_factory.mktemp("classify")
    options = list(TRAINING)
    # 61 texts: neither batches nor processes divide them.
    for name, count in (("train", 300), ("validation", 61)):
        rows = colours(count, count)
        options += [f"--{name}_file", write(folder / f"{name}.csv", rows, ("marks", "colour"))]
    options += ["--output_dir", str(folder / "out")]
    done = launch(TWO, "classify.py", *options)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, options


def test_run_records_what_the_saved_models_say(finished: tuple[Path, str, list[str]]) -> None:
    folder, output, _ = finished
    content = json.loads((folder / "out" / "results.json").read_text())
    assert [run["variant"] for run in content["runs"]] == ["sdpa", "expressive:scale=learned"]
    assert content["environment"]["hardware"]["processes"] == 2
    for run in content["runs"]:
        where = folder / "out" / run["folder"]
        model = AutoModelForSequenceClassification.from_pretrained(where).eval()
        tokenizer = AutoTokenizer.from_pretrained(where)
        assert model.config._attn_implementation == run["attention"]["mechanism"]
        right = 0
        for text, colour in colours(61, 61):
            with torch.no_grad():
                best = model(**tokenizer(text, return_tensors="pt")).logits.argmax().item()
            right += model.config.id2label[best] == colour
        assert run["final"]["accuracy"] == right / 61
        assert run["final"]["accuracy"] > 0.8, "nothing was learned; a blind guess is about 0.5"
        assert run["curve"]["step"] == [0, 30, 60]
        assert run["curve"]["f1"][-1] == run["final"]["f1"] != run["final"]["loss"]
        assert f"3: {run['final']['accuracy']:.4f}" in output
        assert (where / "README.md").exists() == (run["variant"] != "sdpa")
    assert output.count("loaded again, accuracy") == 2
    assert (folder / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_card_tells_task_and_loads_the_right_class(finished: tuple[Path, str, list[str]]) -> None:
    folder, _, _ = finished
    card = (folder / "out" / "expressive-scale=learned-seed3" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "Tell the class of a text: green, red." in card


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ([], "exists; choose another --output_dir, or pass --overwrite."),
        (["--overwrite", "--batch_size", "25"], "--batch_size must be a multiple of 2"),
        (["--overwrite", "--text_column", "words"], "error: the data has no column words"),
    ],
)
def test_what_cannot_work_ends_before_anything_is_replaced(
    finished: tuple[Path, str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    sentence: str,
) -> None:
    folder, _, options = finished
    before = (folder / "out" / "results.json").read_bytes()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["classify.py", *options, *extra])
    with pytest.raises(SystemExit, match=sentence):
        recipe.main()
    assert (folder / "out" / "results.json").read_bytes() == before


def test_reload_refuses_what_differs(finished: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, _, _ = finished
    run = Record.load(folder / "out" / "results.json").runs[1]
    made = task(tmp_path)
    wrong = supervised.Run(**{**vars(run), "attention": {"mechanism": "sdpa"}})
    arguments = Accelerator(cpu=True), made, supervised.TrainingOptions()
    with pytest.raises(RuntimeError, match="trained with sdpa attention, but loads as expressive"):
        supervised.reload(*arguments, wrong, folder / "out")
    worse = supervised.Run(**{**vars(run), "final": {"accuracy": 0.123}})
    with pytest.raises(RuntimeError, match=r"had accuracy 0\.123 when it was saved"):
        supervised.reload(*arguments, worse, folder / "out")
