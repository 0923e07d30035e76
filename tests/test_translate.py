"""The translation recipe: metric, vocabulary, batches, loss, generation, a whole run."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from launching import ONE, RECIPES, TWO, launch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

sys.path.insert(0, str(RECIPES))

import translate as recipe
from arguments import Attention


def reversals(count: int, seed: int) -> list[tuple[str, str]]:
    """A few words, and the same words backwards."""
    generator = np.random.default_rng(seed)
    words = ["ant", "bee", "cat", "dog", "eel", "fox"]
    rows = []
    for _ in range(count):
        text = generator.choice(words, size=generator.integers(4, 7)).tolist()
        rows.append((" ".join(text), " ".join(reversed(text))))
    return rows


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("labels", "input_ids"), *rows])
    return str(path)


def task(folder: Path, **model: object) -> recipe.Translation:
    """A small task; the columns are called as if to mislead the recipe."""
    data = recipe.TranslationData(
        train_file=write(folder / "train.csv", reversals(40, 0)),
        validation_file=write(folder / "validation.csv", reversals(9, 1)),
        source_column="labels",
        target_column="input_ids",
        max_length=10,
    )
    small = {"width": 16, "layers": 1, "heads": 2, "vocabulary": 300, "num_beams": 1}
    return recipe.Translation(data, recipe.ModelOptions(**{**small, **model}))


# ---- metric --------------------------------------------------------------------------------------


def test_metric_agrees_with_a_hand_count() -> None:
    metric = evaluate.load(recipe.METRIC, keep_in_memory=True)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; as long as the reference.
    found = metric.compute(
        predictions=["the cat sat on a mat"], references=["the cat sat on the mat"]
    )
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert "tok:13a" in found["signature"]


def test_metric_in_two_parts_is_that_of_the_corpus() -> None:
    predictions, references = zip(*reversals(8, 0), strict=True)
    metric = evaluate.load(recipe.METRIC, keep_in_memory=True)
    whole = metric.compute(predictions=predictions, references=references)["bleu"]
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add_batch(predictions=predictions[3:], references=references[3:])
    assert metric.compute()["bleu"] == whole
    assert 0 < whole < 100


# ---- data ----------------------------------------------------------------------------------------


def test_default_is_iwslt_and_a_file_replaces_it() -> None:
    default = recipe.TranslationData()
    assert default.dataset == "bbaaaa/iwslt14-de-en"
    assert default.dataset_revision == "refs/convert/parquet"
    own = recipe.TranslationData(train_file="pairs.csv")
    assert (own.dataset, own.dataset_revision, own.name) == (None, None, "pairs")


def test_vocabulary_is_learned_and_loses_nothing(tmp_path: Path) -> None:
    train = Dataset.from_dict({"de": ["das das das"] * 5, "en": ["that that that"] * 5})
    recipe.learn_tokenizer(train, 300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert 259 < len(tokenizer) <= 300
    for known in ("das", "that"):
        assert len(tokenizer(f"{known} {known}")["input_ids"]) == 3
    unknown = "Größe → 漢"
    ids = tokenizer(unknown)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == unknown


def test_batch_shifts_the_labels_behind_the_start_token(tmp_path: Path) -> None:
    made = task(tmp_path)
    rows = sorted(made.splits["train"], key=lambda row: len(row["labels"]))
    batch = made.collate([rows[0], rows[-1]])
    short, long = rows[0]["labels"], rows[-1]["labels"]
    gap = len(long) - len(short)
    assert gap > 0
    start, padding = made.tokenizer.bos_token_id, made.tokenizer.pad_token_id
    assert batch["labels"].tolist() == [short + [-100] * gap, long]
    assert batch["decoder_input_ids"].tolist() == [
        [start, *short[:-1]] + [padding] * gap,
        [start, *long[:-1]],
    ]
    for row in (rows[0], rows[-1]):
        source, target = reversals(40, 0)[row["index"]]
        decoded = [
            made.tokenizer.decode(row[key], skip_special_tokens=True)
            for key in ("input_ids", "labels")
        ]
        assert decoded == [source, target]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"heads": 3}, "--heads must divide --width, which is 256; got 3"),
        ({"num_beams": 0}, "--num_beams must be at least 1"),
        ({"vocabulary": 100}, "--vocabulary must be at least 300"),
        ({"dropout": 1.0}, "--dropout must be from 0 to below 1"),
        ({"label_smoothing": -0.1}, "--label_smoothing must be from 0"),
        ({"checkpoint": "a", "tokenizer": "b"}, "a --checkpoint brings its own"),
    ],
)
def test_bad_model_options_are_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe.ModelOptions(**values)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bart", "marian"])
@pytest.mark.parametrize("text", ["sdpa", "expressive:scale=2", "implicit_kernel:kernel=copula"])
def test_loss_is_that_of_the_model(tmp_path: Path, architecture: str, text: str) -> None:
    made = task(tmp_path, architecture=architecture, label_smoothing=0.0)
    model = made.build(Attention.parse(text)).eval()
    assert model.config.model_type == architecture
    batch = made.collate([made.splits["train"][i] for i in range(7)])
    with torch.no_grad():
        losses = made.losses(model, batch)
        # Transformers' own, from its own shifted labels: the mean over the tokens.
        theirs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        ).loss
    assert losses.shape == (7,)
    tokens = (batch["labels"] != -100).sum()
    torch.testing.assert_close(losses.sum() * made.mean_length / tokens, theirs)
    lengths = [len(row["labels"]) for row in made.splits["train"]]
    assert made.mean_length == pytest.approx(sum(lengths) / 40)


def test_label_smoothing_is_for_training_alone(tmp_path: Path) -> None:
    made, plain = (task(tmp_path, label_smoothing=value) for value in (0.5, 0.0))
    model = made.build(Attention.parse("sdpa")).eval()
    batch = made.collate([made.splits["train"][0]])
    with torch.no_grad():
        assert not torch.allclose(made.losses(model, batch), plain.losses(model, batch))
        measured = made._token_losses(model, batch, 0.0).sum() / made.mean_length
        torch.testing.assert_close(measured, plain.losses(model, batch)[0])


@pytest.mark.parametrize("text", ["sdpa", "expressive", "implicit_kernel:kernel=implicit"])
def test_greedy_generation_follows_the_most_likely_token(tmp_path: Path, text: str) -> None:
    torch.manual_seed(1)
    made = task(tmp_path)
    model = made.build(Attention.parse(text)).eval()
    batch = made.collate([made.splits["validation"][i] for i in range(3)])
    ids = torch.full((3, 1), made.tokenizer.bos_token_id)
    done = torch.zeros(3, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(10):
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                decoder_input_ids=ids,
                use_cache=False,
            ).logits[:, -1]
            best = logits.argmax(-1).masked_fill(done, made.tokenizer.pad_token_id)
            done |= best == made.tokenizer.eos_token_id
            ids = torch.cat([ids, best[:, None]], dim=1)
    expected = made.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert made.generate(model, batch) == expected
    assert any(expected)


def test_checkpoint_keeps_weights_tokenizer_and_start(tmp_path: Path) -> None:
    made = task(tmp_path)
    stock = made.build(Attention.parse("sdpa"))
    stock.save_pretrained(tmp_path / "stock")
    made.tokenizer.save_pretrained(tmp_path / "stock")
    again = task(tmp_path, checkpoint=str(tmp_path / "stock"))
    assert again.config.decoder_start_token_id == made.tokenizer.bos_token_id
    assert again.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    model = again.build(Attention.parse("expressive:power=2"))
    assert model.config.hf_expressive["power"] == 2.0
    for name, weight in stock.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pairs")
    files = {
        "train": write(folder / "train.csv", reversals(1500, 2)),
        # Neither batches nor processes divide 21.
        "validation": write(folder / "validation.csv", reversals(21, 3)),
    }
    return [
        *(f"--{name}_file={path}" for name, path in files.items()),
        *("--source_column", "labels", "--target_column", "input_ids", "--max_length", "10"),
        *("--architecture", "bart", "--width", "64", "--layers", "1", "--heads", "2"),
        *("--vocabulary", "300", "--dropout", "0", "--label_smoothing", "0", "--num_beams", "2"),
        *("--batch_size", "48", "--learning_rate", "4e-3", "--warmup_steps", "30"),
        *("--seeds", "0", "--attention", "expressive"),
    ]


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and terminal output of a run in one process."""
    folder = tmp_path_factory.mktemp("run") / "out"
    steps = ["--schedule", "linear", "--steps", "200", "--evaluate_every", "100"]
    done = launch(ONE, "translate.py", *options, *steps, "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_run_learns_to_reverse(finished: tuple[Path, str]) -> None:
    folder, output = finished
    content = json.loads((folder / "results.json").read_text())
    (run,) = content["runs"]
    assert run["curve"]["step"] == [0, 100, 200]
    assert run["curve"]["bleu"][0] < 10
    assert run["final"]["bleu"] > 90
    assert run["final"]["loss"] < 0.1
    assert "loaded again, bleu" in output
    assert (folder / "bleu.png").read_bytes().startswith(b"\x89PNG")

    where = folder / run["folder"]
    model = AutoModelForSeq2SeqLM.from_pretrained(where).eval()
    assert model.config._attn_implementation == "expressive"
    tokenizer = AutoTokenizer.from_pretrained(where)
    right = 0
    for source, target in reversals(21, 3):
        ids = model.generate(
            **tokenizer(source, return_tensors="pt", return_token_type_ids=False),
            max_new_tokens=10,
            num_beams=2,
        )
        right += tokenizer.decode(ids[0], skip_special_tokens=True) == target
    assert right >= 17
    assert "type: translation" in (where / "README.md").read_text()


def test_two_processes_train_the_model_of_one(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ["--steps", "6", "--evaluate_every", "3", "--gradient_accumulation_steps", "2"]
    short = [*options, *steps]
    done = launch(TWO, "translate.py", *short, "--output_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(
        sys, "argv", ["translate.py", *short, "--output_dir", str(tmp_path / "one")]
    )
    recipe.main()

    records = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    ]
    assert [record["environment"]["hardware"]["processes"] for record in records] == [1, 2]
    one, two = (record["runs"][0]["curve"] for record in records)
    assert one["step"] == two["step"] == [0, 3, 6]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert one["loss"][-1] < one["loss"][0]
    assert one["bleu"] == pytest.approx(two["bleu"], rel=1e-4)
