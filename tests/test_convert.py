"""The conversion recipe: transfer, ablation, text, metric, and whole runs, killed and taken up again."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import evaluate
import pytest
import tiny
import torch
from accelerate import Accelerator
from launching import ONE, RECIPES, REPOSITORY, TWO, launch
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import LOGITS
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import hf_expressive
from hf_expressive import ExpressiveConfig, ImplicitKernelConfig
from hf_expressive.attention.base import Mechanism

sys.path.insert(0, str(RECIPES))

import convert as recipe
from arguments import Attention
from conversion.objectives import METRICS, SentenceEmbedding
from conversion.options import ConversionOptions, TransferOptions, TuningOptions
from conversion.report import LOSSLESS
from conversion.run import lora_config
from conversion.text import TextOptions, docstring_sentences, read_texts
from conversion.transfer import (
    AttentionTransfer,
    ablated,
    as_teacher,
    learning_modules,
    mean_error,
)
from reporting import Record, Run

# ---- stage 1 -------------------------------------------------------------------------------------


def bert(**options: Any) -> BertModel:
    torch.manual_seed(0)
    return BertModel(tiny.bert_config(**options)).eval()


def errors_of(transfer: AttentionTransfer) -> torch.Tensor:
    difference, size = transfer(batch_of(transfer.student)).sum(dim=0)
    return difference / size


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    batch = {"input_ids": tiny.tokens()}
    if isinstance(model, BertModel):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 5:] = 0
    return batch


def transfer_onto(model: Any, config: Any) -> AttentionTransfer:
    """From a model to a copy of it with a mechanism."""
    student = type(model)(copy.deepcopy(model.config))
    student.load_state_dict(model.state_dict())
    hf_expressive.attach(student.eval(), config)
    return AttentionTransfer(student, as_teacher(model), lambda batch: batch)


@pytest.mark.parametrize("make", [bert, tiny.llama])
def test_errors_of_layers_that_stay_softmax_are_zero(make: Any) -> None:
    lossless = ImplicitKernelConfig(kernel="rbf", norm_dropout=0.0)
    transfer = transfer_onto(make(), lossless)
    assert (errors_of(transfer) < LOSSLESS).all()
    transfer = transfer_onto(make(), ExpressiveConfig(softmax_layers=[0]))
    first, second = errors_of(transfer).tolist()
    assert first < LOSSLESS
    assert second > 0.01
    assert [found.layer for found in learning_modules(transfer.student)] == [1]


def test_teacher_computes_the_checkpoints_own_softmax() -> None:
    model = bert()
    batch = batch_of(model)
    before = model(**batch).last_hidden_state
    assert torch.allclose(as_teacher(model)(**batch).last_hidden_state, before, atol=LOGITS)


@torch.no_grad()
def test_error_is_relative_and_without_padding() -> None:
    """Against the layers' outputs as hooks see them, each student layer on the teacher's input."""
    transfer = transfer_onto(bert(), ExpressiveConfig())
    (teacher,) = transfer._teacher
    batch = batch_of(teacher)
    states = teacher(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    errors = errors_of(transfer)
    for layer, error in enumerate(errors.tolist()):
        outputs = []
        for model in (transfer.student, teacher):
            attention = model.encoder.layer[layer].attention.self
            padded = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None]
            outputs.append(attention(states[layer], padded.expand(-1, 1, 9, -1))[0][mask])
        ours, theirs = outputs
        wanted = (ours - theirs).square().sum() / theirs.square().sum()
        assert error == pytest.approx(float(wanted), rel=1e-4)


def test_gradients_of_a_layer_come_from_its_own_error() -> None:
    transfer = transfer_onto(tiny.llama(), ExpressiveConfig(scale="learned"))
    errors_of(transfer)[1].backward()
    gains = [found.module.mechanism.gain.log_gain for found in learning_modules(transfer.student)]
    assert gains[0].grad is None or not gains[0].grad.any()
    assert gains[1].grad is not None
    assert gains[1].grad.all()
    assert not any(name.startswith("_teacher") for name in transfer.state_dict())


def test_training_leaves_dropout_off_and_noise_on() -> None:
    options = ImplicitKernelConfig(kernel="implicit", num_features=4, condition="constant")
    transfer = transfer_onto(bert(), options)
    batch = batch_of(transfer.student)
    transfer.train()
    assert not any(
        module.training for module in transfer.modules() if isinstance(module, torch.nn.Dropout)
    )
    first, second = transfer(batch), transfer(batch)
    assert not torch.equal(first, second)
    # The regulariser of the noise is that of this pass, and reaches its densities.
    mean_error(Accelerator(), second).add(hf_expressive.auxiliary_loss(transfer)).backward()
    densities = [n for n, p in transfer.named_parameters() if "density" in n and p.grad is not None]
    assert densities
    transfer.eval()
    assert torch.equal(transfer(batch), transfer(batch))


# ---- ablation ------------------------------------------------------------------------------------


def test_ablations() -> None:
    model = hf_expressive.attach(tiny.llama(), ExpressiveConfig(softmax_heads=2))
    before = tiny.logits(model)
    seen: dict[str, list[torch.Tensor]] = {}
    for how in ("uniform", "zero"):
        outputs: list[torch.Tensor] = []
        children = [module for module in model.modules() if isinstance(module, Mechanism)]
        calls: list[Any] = []

        def note(
            _: Any, args: Any, result: Any, outputs: Any = outputs, calls: Any = calls
        ) -> None:
            calls.append(args[0])
            outputs.append(result[0])

        handle = children[0].register_forward_hook(note)
        with ablated(model, how):
            tiny.logits(model)
        handle.remove()
        seen[how] = outputs
        value = calls[0].value.repeat_interleave(2, dim=1)
        mean = value.cumsum(2) / torch.arange(1, 10)[:, None]
        wanted = mean if how == "uniform" else torch.zeros_like(mean)
        assert torch.allclose(outputs[0][:, 2:], wanted[:, 2:], atol=1e-5)
    assert torch.equal(seen["uniform"][0][:, :2], seen["zero"][0][:, :2])
    assert torch.equal(tiny.logits(model), before)


# ---- text and metric -----------------------------------------------------------------------------


def test_sentences_of_docstrings(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "helper.py").write_text('"""This sentence belongs to a test here."""\n')
    (tmp_path / "broken.py").write_text("def :\n")
    (tmp_path / "module.py").write_text(
        '"""Heading\n\nThe first sentence goes over two\nlines of the text. Too short. '
        'And here is the second one!\n\n    >>> This is an example of the code.\n"""\n'
        'def f():\n    """The first sentence goes over two lines of the text."""\n'
    )
    assert docstring_sentences(tmp_path) == [
        ("module.py", "The first sentence goes over two lines of the text."),
        ("module.py", "And here is the second one!"),
    ]


def test_the_standard_library_has_sentences() -> None:
    found = docstring_sentences(Path(json.__file__).parent)
    assert len(found) > 10


def test_splits_share_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"module{i % 20}.py", f"Sentence number {i}.") for i in range(200)]
    monkeypatch.setattr("conversion.text.docstring_sentences", lambda: rows)
    texts = read_texts(TextOptions(validation_texts=15))
    module = {text: name for name, text in rows}
    modules = {split: {module[text] for text in texts[split]["text"]} for split in texts}
    assert len(texts["validation"]) == 15
    assert not modules["train"] & modules["validation"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("missing.txt", "missing.txt is no file"), ("one.txt", "holds 1 texts; two splits need more")],
)
def test_bad_text_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "one.txt").write_text("Only this.\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        read_texts(TextOptions(text=str(tmp_path / text)))


def test_spearman_by_hand() -> None:
    metric = evaluate.load(str(METRICS / "spearman"), keep_in_memory=True)
    # Ranks 0, 1½, 1½, 3 and 1, 0, 2, 3: product 3, squares 4½ and 5, about the mean 1½.
    found = metric.compute(predictions=[1.0, 2.0, 2.0, 7.0], references=[2.0, 1.0, 3.0, 4.0])
    assert found["spearman"] == pytest.approx(3.0 / (4.5 * 5.0) ** 0.5)
    with pytest.raises(ValueError, match="all predictions are equal"):
        metric.compute(predictions=[1.0, 1.0], references=[1.0, 2.0])


def test_score_of_embeddings() -> None:
    objective = SentenceEmbedding.__new__(SentenceEmbedding)
    objective.metric = evaluate.load(str(METRICS / "spearman"), keep_in_memory=True)
    original = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    turned = objective.score({"embedding": original @ rotation}, {"embedding": original})
    assert turned["spearman"] == pytest.approx(1.0, abs=1e-4)
    assert turned["same_nearest"] == 1.0
    assert turned["cosine"] < 0.9
    other = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    assert abs(objective.score({"embedding": other}, {"embedding": original})["spearman"]) < 0.3


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "sentence"),
    [
        (ConversionOptions, {"attention": ["sdpa"]}, "sdpa is what the checkpoint has"),
        (ConversionOptions, {"seeds": [1, 1]}, "--seeds must be different numbers"),
        (ConversionOptions, {"checkpoint_every": 0}, "--checkpoint_every must be at least 1"),
        (TransferOptions, {"transfer_steps": -1}, "--transfer_steps must be at least 0"),
        (TuningOptions, {"lora_rank": 0}, "--lora_rank must be at least 1"),
        (TextOptions, {"validation_share": 1.0}, "--validation_share must be between 0 and 1"),
    ],
)
def test_bad_options_are_refused(options: Any, values: dict[str, Any], sentence: str) -> None:
    if options is ConversionOptions:
        values = {"checkpoint": "x", **values}
    with pytest.raises(ValueError, match=sentence):
        options(**values)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    recipe.check_settings(tmp_path, {"lora_rank": 4, "seeds": [0]}, overwrite=False)
    recipe.check_settings(tmp_path, {"lora_rank": 4, "seeds": [0, 1]}, overwrite=False)
    with pytest.raises(ValueError, match="holds a conversion with --lora_rank 4, not 8"):
        recipe.check_settings(tmp_path, {"lora_rank": 8, "seeds": [0]}, overwrite=False)
    (tmp_path / "results.json").touch()
    recipe.check_settings(tmp_path, {"lora_rank": 8, "seeds": [0]}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_folder_gathers_finished_runs(tmp_path: Path) -> None:
    texts = ["expressive:scale=learned", "expressive"]
    kinds = [Attention.parse(text) for text in texts]
    for kind, seed, done in ((1, 2, True), (0, 1, True), (0, 0, True), (1, 0, False)):
        run = Run(
            variant=texts[kind],
            attention=kinds[kind].section,
            seed=seed,
            parameters=1,
            seconds=0.0,
            curve={},
            final={},
        )
        where = tmp_path / f"{kind}-{seed}"
        where.mkdir()
        content = {"run": dataclasses.asdict(run)} if done else {"swapped": {}}
        (where / "progress.json").write_text(json.dumps(content), encoding="utf-8")
    found = [(run.variant, run.seed) for run in recipe.finished(tmp_path, kinds)]
    assert found == [(texts[0], 0), (texts[0], 1), (texts[1], 2)]
    found = [(run.variant, run.seed) for run in recipe.finished(tmp_path, kinds[1:])]
    assert found == [(texts[1], 2), (texts[0], 0), (texts[0], 1)]


def test_low_rank_updates_reach_all_but_head_and_mechanism() -> None:
    options = ImplicitKernelConfig(kernel="implicit", num_features=4, condition="constant")
    model = hf_expressive.attach(tiny.llama(), options)
    names = lora_config(model, 2).target_modules
    assert len(names) == 2 * 7
    assert not any("mechanism" in name or "lm_head" in name for name in names)


# ---- whole runs ----------------------------------------------------------------------------------

_SYMBOLS, _FILLING = 8, 5
#: Nats a token of the best model that never finds the first symbol, and of the best model.
_BLIND = ((_FILLING + 1) * torch.log(torch.tensor(float(_SYMBOLS)))).item() / (_FILLING + 2)
_PERFECT = (_FILLING * torch.log(torch.tensor(float(_SYMBOLS)))).item() / (_FILLING + 2)


def lines(count: int, seed: int) -> list[str]:
    """Symbols at random, then a question mark, then the first symbol again."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(_SYMBOLS, (count, 1 + _FILLING), generator=generator).tolist()
    return [" ".join([*map(str, row), "?", str(row[0])]) for row in rows]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax model that has learned to repeat the first symbol, its tokenizer and its text."""
    folder = tmp_path_factory.mktemp("pretrained")
    vocabulary = {token: i for i, token in enumerate([*map(str, range(_SYMBOLS)), "?"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=_FILLING + 3,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=32**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        rows = torch.tensor(tokenizer(lines(128, seed=10 + step))["input_ids"])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(lines(2000, seed=1)) + "\n", encoding="utf-8")
    return folder


def options(checkpoint: Path, folder: Path, *more: str) -> list[str]:
    given = {
        "checkpoint": checkpoint,
        "text": checkpoint / "text.txt",
        "output_dir": folder,
        "max_length": _FILLING + 3,
        "seeds": 0,
        "transfer_steps": 60,
        "tuning_steps": 60,
        "transfer_warmup_steps": 5,
        "tuning_warmup_steps": 5,
        "tuning_learning_rate": 3e-3,
        "batch_size": 64,
        "checkpoint_every": 20,
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


_KINDS = ("--attention", "expressive:scale=learned", "implicit_kernel:kernel=rbf,norm_dropout=0")


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = launch(ONE, "convert.py", *options(checkpoint, folder, *_KINDS))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "heads silent" in done.stdout
    return folder


def measured(folder: Path) -> list[dict[str, Any]]:
    """The runs of a record without what depends on the clock."""
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return [
        {key: value for key, value in run.items() if key != "seconds"} for run in record["runs"]
    ]


def test_a_conversion_brings_back_what_the_softmax_model_could(finished: Path) -> None:
    expressive, rbf = (run["final"] for run in measured(finished))
    gap = _BLIND - _PERFECT
    assert expressive["loss_base"] < _PERFECT + 0.05 * gap  # it had learned
    assert expressive["loss_swapped"] > _PERFECT + 0.3 * gap
    assert expressive["loss"] < expressive["loss_transferred"] < expressive["loss_swapped"]
    assert expressive["loss"] < _PERFECT + 0.05 * gap
    # Without its mechanism the finished model hardly finds the symbol.
    assert min(expressive["loss_uniform"], expressive["loss_zero"]) > _PERFECT + 0.7 * gap
    for layer in range(2):
        assert expressive[f"error_transferred_{layer}"] < 0.5 * expressive[f"error_swapped_{layer}"]
    # The RBF kernel is softmax: nothing is lost and nothing is trained.
    assert rbf["loss"] == rbf["loss_swapped"] == pytest.approx(rbf["loss_base"], abs=LOGITS)


def test_what_a_conversion_leaves_behind(finished: Path, checkpoint: Path) -> None:
    record = Record.load(finished / "results.json")
    assert record.card["variant"] == "expressive:scale=learned"
    assert record.card["architecture"] == "GPT2LMHeadModel"
    assert (finished / "convert.png").stat().st_size > 10_000
    for run in record.runs:
        where = finished / str(run.folder)
        assert not list(where.glob("checkpoints-*"))
        assert not (where / "transferred").exists()
        model = AutoModelForCausalLM.from_pretrained(where)
        assert model.config._attn_implementation == run.attention["mechanism"]
        assert "Converted from" in (where / "README.md").read_text(encoding="utf-8")
        assert (where / "tokenizer.json").exists()


def test_a_killed_conversion_goes_on_to_the_same_result(
    finished: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Killed once within each stage."""
    command = [sys.executable, "-m", *ONE, str(RECIPES / "convert.py")]
    command += options(checkpoint, tmp_path, *_KINDS)
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    run = tmp_path / "expressive-scale=learned-seed0"
    for stage in ("transfer", "tuning"):
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wanted = run / f"checkpoints-{stage}"
        while process.poll() is None and not list(wanted.glob("step-*")):
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert list(wanted.glob("step-*")), "the run ended before it could be killed"
        assert not (tmp_path / "results.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert measured(tmp_path) == measured(finished)


def test_two_processes_convert_as_one(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = launch(TWO, "convert.py", *options(checkpoint, tmp_path, *_KINDS[:2]))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = measured(finished)[0]["final"], measured(tmp_path)[0]["final"]
    assert one.keys() == two.keys()
    for name, value in one.items():
        # What the finished model would do without its mechanism is nothing that training holds fast:
        # there another order of summation shows by more.
        if "uniform" not in name and "zero" not in name:
            assert two[name] == pytest.approx(value, rel=0.02, abs=1e-3), name
    for name in ("loss_base", "loss_swapped", "error_swapped_0", "error_swapped_1"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_a_folder_of_another_conversion_is_refused(
    finished: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    done = launch(ONE, "convert.py", *options(checkpoint, folder, *_KINDS, "--lora_rank", "2"))
    assert done.returncode != 0
    assert "holds a conversion with --lora_rank 16, not 2" in done.stderr
    assert measured(folder) == measured(finished)
