"""The recipe on NT(N, τ) sequences: data, metric, measurement, records, and whole runs."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from launching import ONE, RECIPES, REPOSITORY, TWO, launch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import hf_expressive
from hf_expressive.hub import render_card

sys.path.insert(0, str(RECIPES))

import arguments
import nt_prediction as recipe
import reporting
import supervised

SMALL = recipe.TaskOptions(basis=5, delay=3, length=11, train_size=70, validation_size=37)


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("basis", "delay", "length"), [(2, 2, 3), (5, 3, 11), (16, 5, 32)])
def test_sequences_obey_the_recurrence(basis: int, delay: int, length: int) -> None:
    rows = recipe.sequences(basis, delay, length, count=4, seed=0)
    assert rows.shape == (4, length)
    assert rows.min() >= 0
    assert rows.max() < basis
    for row in rows.tolist():
        for t in range(delay, length):
            assert row[t] == (row[t - 1] + row[t - delay]) % basis


def test_sequences_are_different_and_all_can_be_drawn() -> None:
    rows = recipe.sequences(3, 4, 6, count=81, seed=1)
    heads = {tuple(row[:4]) for row in rows.tolist()}
    assert len(heads) == 81


def test_sequences_depend_on_the_seed_alone() -> None:
    first, again, other = (recipe.sequences(16, 5, 32, 50, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_dataset_splits_share_no_sequence() -> None:
    data = recipe.nt_dataset(SMALL, seed=0)
    assert {name: len(split) for name, split in data.items()} == {"train": 70, "validation": 37}
    train, validation = (
        {tuple(row.tolist()) for row in data[split][:]["input_ids"]} for split in data
    )
    assert len(train) == 70
    assert len(validation) == 37
    assert not train & validation


def test_loader_runs_through_the_split_before_a_sequence_comes_again() -> None:
    split = recipe.nt_dataset(SMALL, seed=0)["train"]
    task = nt_task()
    task.draw(0)
    batches = [batch["input_ids"] for batch in task.loader("train", batch_size=10, steps=9)]
    assert [tuple(batch.shape) for batch in batches] == [(10, 11)] * 9
    rows = [tuple(row) for row in torch.cat(batches).tolist()]
    everything = {tuple(row.tolist()) for row in split[:]["input_ids"]}
    assert set(rows[:70]) == everything
    assert rows[:70] != [tuple(row.tolist()) for row in split[:]["input_ids"]]
    in_order = torch.cat([batch["input_ids"] for batch in task.loader("train", batch_size=32)])
    assert torch.equal(in_order, split[:]["input_ids"])


# ---- metric, loss, measurement -------------------------------------------------------------------


@pytest.fixture
def metric() -> evaluate.EvaluationModule:
    return evaluate.load(recipe.METRIC, keep_in_memory=True)


PREDICTIONS = [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]]
REFERENCES = [[-100, 2, 9, 4], [-100, -100, -100, 8], [-100, 0, 1, 0]]
#           counts:     2/3                1/1              2/3   →  5 right of 7


def test_metric_agrees_with_a_hand_count(metric: evaluate.EvaluationModule) -> None:
    found = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found == {"accuracy": 5 / 7, "correct": 5, "total": 7}


def test_metric_in_two_parts_is_the_metric_of_the_whole(metric: evaluate.EvaluationModule) -> None:
    metric.add_batch(predictions=PREDICTIONS[:1], references=REFERENCES[:1])
    metric.add_batch(predictions=PREDICTIONS[1:], references=REFERENCES[1:])
    assert metric.compute()["accuracy"] == 5 / 7


def test_metric_takes_another_ignored_value(metric: evaluate.EvaluationModule) -> None:
    found = metric.compute(predictions=[[0, 2], [3]], references=[[0, 2], [0]], ignore_index=0)
    assert found == {"accuracy": 1.0, "correct": 1, "total": 1}


def test_metric_refuses_what_has_no_accuracy(metric: evaluate.EvaluationModule) -> None:
    with pytest.raises(ValueError, match="no accuracy is defined"):
        metric.compute(predictions=[[1, 2]], references=[[-100, -100]])


def test_metric_refuses_rows_of_different_length(metric: evaluate.EvaluationModule) -> None:
    with pytest.raises(ValueError, match="sequence 1 has 1 predictions, but 2 references"):
        metric.compute(predictions=[[1, 2], [3]], references=[[1, 2], [3, 4]])


def test_loss_is_the_mean_over_the_determined_symbols() -> None:
    rows = torch.tensor([[0, 2, 1, 2], [1, 1, 0, 2]])
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    loss = recipe.determined_loss(logits, rows, delay=2)
    for row, values, found in zip(rows.tolist(), logits.tolist(), loss.tolist(), strict=True):
        by_hand = [
            math.log(sum(map(math.exp, values[t - 1]))) - values[t - 1][row[t]] for t in (2, 3)
        ]
        assert found == pytest.approx(sum(by_hand) / 2)
    loss.sum().backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(dim=(0, 2)) > 0
    assert touched.tolist() == [False, True, True, False]


class Oracle(nn.Module):
    """Predicts x_{t+1} = x_t + x_{t+1−delay}, and the symbol 0 where that needs x before the start."""

    def __init__(self, basis: int, delay: int) -> None:
        super().__init__()
        self.basis, self.delay = basis, delay

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        before = torch.zeros_like(input_ids)
        before[:, self.delay - 1 :] = input_ids[:, : input_ids.shape[1] - self.delay + 1]
        symbols = (input_ids + before) % self.basis
        symbols[:, : self.delay - 1] = 0
        return SimpleNamespace(logits=nn.functional.one_hot(symbols, self.basis).float())


def nt_task(task: recipe.TaskOptions = SMALL) -> recipe.NTPrediction:
    return recipe.NTPrediction(task, recipe.ModelOptions(width=8))


def measure(task: recipe.NTPrediction, model: nn.Module, seed: int = 0) -> dict[str, float]:
    task.draw(seed)
    return task.measure(Accelerator(cpu=True), model, task.loader("validation", 16))


def test_measured_accuracy_counts_exactly_the_determined_symbols() -> None:
    task = nt_task()
    assert measure(task, Oracle(5, 3))["accuracy"] == 1.0

    wrong = measure(task, Oracle(5, 2))
    rows = task.splits["validation"][:]["input_ids"].tolist()
    right = [(row[t - 1] + row[t - 2]) % 5 == row[t] for row in rows for t in range(3, 11)]
    assert wrong["accuracy"] == sum(right) / len(right)


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "sentence"),
    [
        (recipe.TaskOptions, {"basis": 1}, "--basis must be at least 2, got 1"),
        (recipe.TaskOptions, {"delay": 32}, "--length must exceed --delay, which is 32"),
        (recipe.TaskOptions, {"basis": 2, "delay": 4}, "only 16 different sequences"),
        (recipe.TaskOptions, {"validation_size": 0}, "--validation_size must be at least 1"),
        (recipe.ModelOptions, {"heads": 3}, "--heads must divide --width, which is 32; got 3"),
        (recipe.ModelOptions, {"initializer_range": 0.0}, "--initializer_range must be positive"),
        (recipe.NTTraining, {"steps": 0}, "--steps must be at least 1, got 0"),
        (recipe.NTTraining, {"seeds": [1, 1]}, "--seeds must be different numbers ≥ 0"),
        (recipe.NTTraining, {"learning_rate": -1.0}, "--learning_rate must be positive"),
        (recipe.NTTraining, {"attention": ["sdpa", "sdpa"]}, "names one kind twice"),
        (recipe.NTTraining, {"attention": ["softmax"]}, "--attention must be one of sdpa"),
        (recipe.NTTraining, {"attention": ["sdpa:power=2"]}, "sdpa takes no options"),
        (recipe.NTTraining, {"attention": ["expressive:power"]}, "expected option=value"),
        (recipe.NTTraining, {"attention": ["expressive:pow=2"]}, "unknown option pow"),
        (recipe.NTTraining, {"attention": ["expressive:power=no"]}, "power must be"),
    ],
)
def test_bad_options_are_refused_by_name(options: type, values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        options(**values)


def test_training_takes_what_is_left_of_a_small_task() -> None:
    assert recipe.TaskOptions().train_size == 65536
    assert recipe.TaskOptions(basis=8).train_size == 8**5 - 2048
    assert recipe.ModelOptions(width=16).initializer_range == 0.25


def call(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """The recipe's main function with a command line, without a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["nt_prediction.py", *options])
    recipe.main()


def test_help_explains_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--help")
    assert end.value.code == 0
    told = capsys.readouterr().out
    for group in (
        recipe.TaskOptions,
        recipe.ModelOptions,
        recipe.NTTraining,
        recipe.OutputOptions,
    ):
        assert f"{group._argument_group_name}:" in told
        for field in fields(group):
            assert f"--{field.name}" in told
            assert len(field.metadata["help"]) > 10
    assert "    accelerate launch recipes/nt_prediction.py\n" in told
    assert "(default: 16)" in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--heads", "5"], "--heads must divide --width, which is 32; got 5."),
        (["--step", "5"], "Some specified arguments are not used"),
        (["--report_to", "paper"], "--report_to must be one of none, all, "),
        (
            ["--batch_size", "5", "--gradient_accumulation_steps", "2"],
            "--batch_size must be a multiple of 2, processes × accumulated batches; got 5.",
        ),
    ],
)
def test_bad_command_line_ends_with_one_sentence(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "untouched"
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--output_dir", str(folder), *options)
    told = capsys.readouterr().err + str(end.value.code)
    assert f"error: {sentence}" in told
    assert not folder.exists()


def test_results_are_not_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(
        SystemExit, match=r"exists; choose another --output_dir, or pass --overwrite"
    ):
        call(monkeypatch, "--output_dir", str(tmp_path))
    assert (tmp_path / "results.json").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_attention_is_read_with_its_options() -> None:
    read = arguments.Attention.parse("expressive:scale=learned,softmax_layers=[0,2],power=2")
    assert read.options == hf_expressive.ExpressiveConfig(
        scale="learned", softmax_layers=(0, 2), power=2.0
    )
    assert arguments.Attention.parse("sdpa").options is None
    assert arguments.Attention.parse("expressive").options == hf_expressive.ExpressiveConfig()
    assert read.file_name == "expressive-scale=learned-softmax_layers=-0-2-power=2"


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_model_is_the_one_described(architecture: str) -> None:
    options = recipe.ModelOptions(architecture=architecture, width=12, layers=2, heads=3)
    config = recipe.model_config(options, SMALL)
    model = arguments.Attention.parse("expressive:power=2").causal_lm(config)
    assert model.config.model_type == architecture
    assert model.config._attn_implementation == "expressive"
    assert model.config.hf_expressive["power"] == 2.0
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (5, 11)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (12, 2)
    assert model.config.num_attention_heads == 3
    embedding = model.get_input_embeddings().weight
    assert embedding.std().item() == pytest.approx(12**-0.5, rel=0.3)
    assert model.get_output_embeddings().weight is embedding


# ---- records -------------------------------------------------------------------------------------


def record(runs: list[reporting.Run]) -> reporting.Record:
    return reporting.Record(
        recipe="nt_prediction",
        task=recipe.describe(SMALL),
        settings={"steps": 2, "seeds": [0, 1]},
        runs=runs,
        environment=reporting.environment(Accelerator(cpu=True)),
    )


def run(variant: str, seed: int, accuracy: float) -> reporting.Run:
    return reporting.Run(
        variant=variant,
        attention={"mechanism": variant},
        seed=seed,
        parameters=10,
        seconds=1.0,
        curve={"step": [0, 2], "accuracy": [0.1, accuracy], "loss": [2.0, 1.0]},
        final={"accuracy": accuracy, "loss": 1.0},
        folder=f"{variant}-seed{seed}",
    )


def test_spread_by_hand() -> None:
    spread = reporting.Spread.of([0.5, 0.7, 0.9])
    assert spread.mean == pytest.approx(0.7)
    assert spread.deviation == pytest.approx(0.2)
    assert (spread.low, spread.high) == (0.5, 0.9)
    assert str(spread) == "0.7000 ± 0.2000"
    assert str(reporting.Spread.of([0.25])) == "0.2500"


def test_record_survives_its_file(tmp_path: Path) -> None:
    before = record([run("sdpa", 0, 0.5), run("expressive", 0, 1.0), run("sdpa", 1, 0.75)])
    before.save(tmp_path / "new" / "results.json")
    assert reporting.Record.load(tmp_path / "new" / "results.json") == before
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert list(content["summary"]) == ["sdpa", "expressive"]
    assert content["summary"]["sdpa"]["mean"] == 0.625
    assert content["summary"]["sdpa"]["seeds"] == [0, 1]
    versions = content["environment"]["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["hf_expressive"] == hf_expressive.__version__
    assert content["environment"]["hardware"]["cores"] == os.cpu_count()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    reporting.write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            reporting.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_picture_shows_every_run_and_the_means() -> None:
    runs = [run("sdpa", 0, 0.5), run("sdpa", 1, 0.75), run("expressive", 0, 1.0)]
    (axes,) = reporting.draw(record(runs)).axes
    drawn = [(line.get_linewidth(), list(line.get_ydata())) for line in axes.lines]
    thin = [values for width, values in drawn if width < 1]
    thick = [values for width, values in drawn if width > 2]
    assert thin == [[0.1, 0.5], [0.1, 0.75], [0.1, 1.0], [0.2, 0.2]]
    assert thick == [[0.1, 0.625], [0.1, 1.0]]
    assert list(axes.lines[0].get_xdata()) == [0, 2]
    colours = {line.get_color() for line in axes.lines if line.get_linewidth() > 2}
    assert colours == {"#0072B2", "#D55E00"}
    legend = axes.get_legend()
    assert legend is not None
    told = [text.get_text() for text in legend.get_texts()]
    assert told == ["sdpa", "expressive", "blind guess"]


# ---- saved models --------------------------------------------------------------------------------


def saved_run(folder: Path, text: str) -> tuple[recipe.NTPrediction, reporting.Run]:
    task, attention = nt_task(), arguments.Attention.parse(text)
    torch.manual_seed(0)
    model = attention.causal_lm(recipe.model_config(task.model, task.task))
    model.save_pretrained(folder / "saved")
    final = measure(task, model.eval(), seed=4)
    return task, replace(
        run(text, 4, 0.0), attention=attention.section, final=final, folder="saved"
    )


def reload(folder: Path, task: recipe.NTPrediction, trained: reporting.Run) -> Any:
    training = recipe.NTTraining(batch_size=16)
    return supervised.reload(Accelerator(cpu=True), task, training, trained, folder)


def test_reload_measures_the_same_accuracy(tmp_path: Path) -> None:
    task, trained = saved_run(tmp_path, "expressive")
    assert reload(tmp_path, task, trained).config._attn_implementation == "expressive"


def test_reload_refuses_another_accuracy(tmp_path: Path) -> None:
    task, trained = saved_run(tmp_path, "expressive")
    with pytest.raises(RuntimeError, match=r"had accuracy 0\.123 when it was saved"):
        reload(tmp_path, task, replace(trained, final={"accuracy": 0.123}))


def test_reload_refuses_another_attention(tmp_path: Path) -> None:
    task, trained = saved_run(tmp_path, "sdpa")
    trained = replace(trained, attention={"mechanism": "expressive"})
    with pytest.raises(RuntimeError, match="trained with expressive attention, but loads as sdpa"):
        reload(tmp_path, task, trained)


# ---- whole runs ----------------------------------------------------------------------------------

TINY = [
    *("--basis", "4", "--delay", "4", "--length", "8", "--train_size", "200"),
    *("--validation_size", "51", "--width", "16", "--batch_size", "40", "--learning_rate", "1e-2"),
    # Enough that every kind of processor, each with roundings of its own, learns with both seeds.
    *("--steps", "240", "--evaluate_every", "120", "--seeds", "0", "7"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and terminal output of a small run with every kind of result."""
    folder = tmp_path_factory.mktemp("run") / "nt"
    kinds = ("--attention", "sdpa", "expressive:power=2")
    done = launch(ONE, "nt_prediction.py", *TINY, "--output_dir", str(folder), *kinds)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_run_records_what_happened(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    content = json.loads((folder / "results.json").read_text())
    assert content["settings"]["basis"] == 4
    assert content["settings"]["initializer_range"] == 0.25
    assert [(run["variant"], run["seed"]) for run in content["runs"]] == [
        ("sdpa", 0),
        ("expressive:power=2", 0),
        ("sdpa", 7),
        ("expressive:power=2", 7),
    ]
    for run in content["runs"]:
        assert run["curve"]["step"] == [0, 120, 240]
        assert run["curve"]["accuracy"][-1] == run["final"]["accuracy"]
        assert run["curve"]["accuracy"][0] < 0.5
        assert run["final"]["accuracy"] > 0.6, (
            "nothing was learned; a blind guess is right in 1 of 4"
        )
    first = [run["curve"]["accuracy"] for run in content["runs"]]
    assert len(set(map(tuple, first))) > 1
    assert content["runs"][1]["attention"]["power"] == 2.0
    assert content["environment"]["hardware"]["processes"] == 1


def test_run_saves_models_that_load_by_their_path_alone(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    content = json.loads((folder / "results.json").read_text())
    for run in content["runs"]:
        model = AutoModelForCausalLM.from_pretrained(folder / run["folder"])
        assert model.config._attn_implementation == run["attention"]["mechanism"]
        rows = recipe.sequences(4, 4, 8, 251, run["seed"])[200:]
        with torch.no_grad():
            predicted = model(input_ids=torch.from_numpy(rows)).logits.argmax(-1).numpy()
        right = predicted[:, 3:-1] == rows[:, 4:]
        assert run["final"]["accuracy"] == right.mean()


def test_run_writes_picture_table_and_cards(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "NT(4, 4) sequence prediction" in output
    content = json.loads((folder / "results.json").read_text())
    for run in content["runs"]:
        assert f"{run['seed']}: {run['final']['accuracy']:.4f}" in output
        card = folder / run["folder"] / "README.md"
        assert card.exists() == (run["variant"] != "sdpa")
    assert output.count("loaded again, accuracy") == 4


def test_record_can_be_shown_again(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    picture, card = tmp_path / "again.png", tmp_path / "card.md"
    model = folder / "expressive-power=2-seed7"
    command = [
        *("reporting.py", str(folder / "results.json"), "--plot", str(picture)),
        *("--card", str(card), "--model", str(model), "--seed", "7"),
        *("--name", "nt-4-4-expressive-power=2-seed7"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    reporting.main()
    assert picture.read_bytes() == (folder / "accuracy.png").read_bytes()
    assert card.read_text() == (model / "README.md").read_text()


#: Runs the recipe, and keeps every process's weights of every model that it saves.
EACH_PROCESS = """
import os, runpy, sys
from pathlib import Path
import torch
from transformers import PreTrainedModel
import hf_expressive

save = PreTrainedModel.save_pretrained

def save_and_keep(model, folder, **options):
    keep = Path(folder).parent / f"{Path(folder).name}-process{os.environ['RANK']}.pt"
    keep.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), keep)
    save(model, folder, **options)

PreTrainedModel.save_pretrained = save_and_keep
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_train_the_model_of_one(tmp_path: Path) -> None:
    options = [*TINY, "--attention", "expressive:scale=learned", "--seeds", "5", "--steps", "9"]
    options += ["--evaluate_every", "3", "--output_dir"]
    script = tmp_path / "each_process.py"
    script.write_text(EACH_PROCESS)
    for done in (
        launch(
            TWO, str(script), str(RECIPES / "nt_prediction.py"), *options, str(tmp_path / "two")
        ),
        launch(ONE, "nt_prediction.py", *options, str(tmp_path / "one")),
        launch(
            *(ONE, "nt_prediction.py", *options, str(tmp_path / "parts")),
            *("--gradient_accumulation_steps", "2"),
        ),
    ):
        assert done.returncode == 0, done.stderr

    records = {
        name: json.loads((tmp_path / name / "results.json").read_text())
        for name in ("one", "two", "parts")
    }
    assert records["two"]["environment"]["hardware"]["processes"] == 2
    curves = {name: content["runs"][0]["curve"] for name, content in records.items()}
    for name in ("two", "parts"):
        assert curves[name]["step"] == [0, 3, 6, 9]
        assert curves[name]["loss"] == pytest.approx(curves["one"]["loss"], abs=1e-4)
        assert curves[name]["accuracy"] == pytest.approx(curves["one"]["accuracy"], abs=0.01)
    # The validation split has 51 sequences: the last batch is uneven, and nothing counts twice.
    assert curves["two"]["accuracy"][0] == curves["one"]["accuracy"][0]

    folder = records["one"]["runs"][0]["folder"]
    weights = load_file(tmp_path / "one" / folder / "model.safetensors")
    for name in ("two", "parts"):
        others = load_file(tmp_path / name / folder / "model.safetensors")
        assert others.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, atol=1e-3, rtol=0, msg=key)

    processes = [torch.load(tmp_path / "two" / f"{folder}-process{rank}.pt") for rank in (0, 1)]
    for key, value in processes[0].items():
        assert torch.equal(value, processes[1][key]), key


# ---- what the repository publishes -------------------------------------------------------------


def test_published_card_and_picture_belong_to_the_published_record(tmp_path: Path) -> None:
    published = RECIPES / "results" / "nt_prediction.json"
    content = json.loads(published.read_text(encoding="utf-8"))
    settings = content["settings"]
    assert settings["attention"] == ["sdpa", "expressive"]
    assert len(content["runs"]) == 2 * len(settings["seeds"]) >= 6
    defaults = {
        key: value
        for options in (recipe.TaskOptions, recipe.ModelOptions, recipe.NTTraining)
        for key, value in asdict(options()).items()
    }
    assert settings == defaults, "the record was made with other settings than the recipe's own"

    trained = next(run for run in content["runs"] if run["variant"] == "expressive")
    config = recipe.model_config(recipe.ModelOptions(), recipe.TaskOptions())
    config.hf_expressive = trained["attention"]
    model = AutoModelForCausalLM.from_config(config)
    name = "nt-16-5-expressive"
    folder = f"outputs/nt_prediction/{trained['folder']}"
    card = render_card(model, results=content, seed=trained["seed"], name=name, model_id=folder)
    published_card = REPOSITORY / "model_cards" / f"{name}.md"
    assert published_card.read_text(encoding="utf-8") == f"{card}"

    reporting.plot(reporting.Record.load(published), tmp_path / "again.png")
    from matplotlib import image

    again, picture = (
        image.imread(path) for path in (tmp_path / "again.png", published.with_suffix(".png"))
    )
    assert again.shape == picture.shape
    # Another version of Matplotlib or of its fonts may place letters a little differently.
    assert np.abs(again - picture).mean() < 0.02
