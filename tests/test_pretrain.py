"""Pretraining: text and its rows, loss, whole runs, exact resume, several processes, Trainer."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from launching import ONE, RECIPES, SHARDED, TWO, launch, launch_and_interrupt
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_expressive import ExpressiveConfig

sys.path.insert(0, str(RECIPES))

import pretrain as recipe
import text as text_module
from arguments import Attention
from loop import Loop, TrainingOptions, parameter_groups
from text import IGNORED, PackedStream, ShuffledBatches, Text, TextOptions, byte_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away"]


def story(seed: int) -> str:
    """A text of 30 to 200 words."""
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, size=random.integers(30, 200)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tales/*.txt` and the same documents in `tales.jsonl`."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tales").mkdir()
    stories = [story(seed) for seed in range(40)]
    for number, words in enumerate(stories):
        (folder / "tales" / f"{number:02}.txt").write_text(words)
    rows = [json.dumps({"words": words}) for words in stories]
    (folder / "tales.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def read(corpus: Path, **options: Any) -> Text:
    given: dict[str, Any] = {"length": 32, "validation_documents": 5, **options}
    return Text(TextOptions(train_files=[str(corpus / "tales" / "*.txt")], **given))


def read_stream(corpus: Path) -> Text:
    return Text(
        TextOptions(
            train_files=[str(corpus / "tales.jsonl")],
            text_column="words",
            streaming=True,
            length=32,
            validation_documents=5,
        )
    )


# ---- text ----------------------------------------------------------------------------------------


def test_byte_tokens_are_the_bytes(corpus: Path) -> None:
    tokenizer = byte_tokenizer()
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    ids = tokenizer(everything)["input_ids"]
    assert ids == list(everything.encode())
    assert tokenizer.decode(ids) == everything
    assert tokenizer.eos_token_id == 256 == len(tokenizer) - 1
    # What the recipe uses, because it takes a hundredth of the time, agrees.
    assert read(corpus).tokens(["αβ", ""]).tolist() == [*"αβ".encode(), 256, 256]


def test_documents_are_set_aside_and_rows_hold_them_all(corpus: Path) -> None:
    text = read(corpus)
    train, aside = list(text.train["text"]), list(text.validation["text"])
    assert len(aside) == 5
    assert sorted(train + aside) == sorted(story(seed) for seed in range(40))
    rows = np.array(text.rows(text.train)["input_ids"])
    tokens = [byte for words in train for byte in [*words.encode(), 256]]
    assert rows.shape == (len(tokens) // 32, 32)
    assert rows.flatten().tolist() == tokens[: rows.size]


def test_batch_tells_documents_apart(corpus: Path) -> None:
    text = read(corpus)
    row = np.array([[5, 6, 256, 7, 8, 9, 256, 256, 3]])
    batch = text.collate(row)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0]]
    x = IGNORED
    assert batch["labels"].tolist() == [[5, 6, 256, x, 8, 9, 256, x, x]]
    joined = read(corpus, documents="joined").collate(row)
    assert joined.keys() == {"input_ids", "labels"}
    assert joined["labels"].tolist() == row.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "expressive:power=2", "implicit_kernel"])
def test_no_token_sees_another_document(corpus: Path, attention: str) -> None:
    text = read(corpus)
    options = recipe.ModelOptions(attention=attention, width=16, layers=2, heads=2)
    torch.manual_seed(0)
    model = Attention.parse(attention).causal_lm(recipe.model_config(options, text)).eval()
    first, second = list(b"one day"), list(b"another")
    packed = text.collate(np.array([[*first, 256, *second]]))
    with torch.no_grad():
        inputs = {key: packed[key] for key in ("input_ids", "position_ids")}
        together = model(**inputs, use_cache=False).logits[0]
        alone = model(input_ids=torch.tensor([second]), use_cache=False).logits[0]
    torch.testing.assert_close(together[len(first) + 1 :], alone, atol=1e-5, rtol=1e-4)


def test_order_runs_through_all_rows_and_begins_anywhere(corpus: Path) -> None:
    text = read(corpus)
    rows = text.rows(text.train)
    order = ShuffledBatches(rows, batch_size=8, seed=3, batches=len(rows) // 4)
    batches = list(order)
    flat = [row for batch in batches for row in batch]
    assert sorted(flat[: len(rows)]) == list(range(len(rows)))
    assert flat[: len(rows)] != sorted(flat[: len(rows)])
    assert flat[len(rows) :] != flat[: len(flat) - len(rows)]
    later = ShuffledBatches(rows, batch_size=8, seed=3, batches=len(rows) // 4)
    later.seek(order.state(8 * 7))
    assert list(later) == batches[7:]
    assert len(later) == len(batches) - 7
    assert list(ShuffledBatches(rows, batch_size=8, seed=4, batches=9)) != batches[:9]


@pytest.mark.parametrize("row", [0, 5, 16, 17, 700, 1203])
def test_stream_goes_on_at_any_row(corpus: Path, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across windows and across the end of the data, 35 documents of about 500 bytes."""
    monkeypatch.setattr(text_module, "_WINDOW", 16)
    stream = PackedStream(read_stream(corpus), seed=1)
    rows = iter(stream)
    before = [next(rows).tolist() for _ in range(row)]
    # The loader has read ahead when the state is taken.
    after = [next(rows).tolist() for _ in range(20)]
    state = json.loads(json.dumps(stream.state(row)))
    again = PackedStream(read_stream(corpus), seed=1)
    again.seek(state)
    assert [found.tolist() for _, found in zip(range(20), again, strict=False)] == after
    assert len({tuple(one) for one in before + after}) > min(row, 500) // 2


def test_stream_holds_the_text_of_the_files(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_WINDOW", 16)
    text = read_stream(corpus)
    tokens = [byte for seed in range(5, 40) for byte in [*story(seed).encode(), 256]]
    rows = [row.tolist() for row, _ in zip(PackedStream(text, seed=0), range(32), strict=False)]
    expected = [tokens[start : start + 32] for start in range(0, 32 * 32, 32)]
    for window in (slice(0, 16), slice(16, 32)):
        assert sorted(rows[window]) == sorted(expected[window])
        assert rows[window] != expected[window]


# ---- loss and figures ----------------------------------------------------------------------------


def test_every_token_weighs_the_same() -> None:
    """The mean over equal parts of a batch is the loss of the batch, wherever documents end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="expressive")
    ids = torch.randint(0, 256, (4, 9))
    labels = ids.clone()
    labels[0, 1:8] = IGNORED
    whole = recipe.mean_loss(model, {"input_ids": ids, "labels": labels})
    parts = [
        recipe.mean_loss(model, {"input_ids": ids[part], "labels": labels[part]})
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    picked = logits.gather(-1, ids[:, 1:, None])[..., 0]
    by_hand = -picked[labels[:, 1:] != IGNORED].sum() / (4 * 8)
    torch.testing.assert_close(whole, by_hand)


# Dynamo looks at the gradient of a layer's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("attention", "graphs"),
    [("sdpa", 1), ("expressive:power=3,sink=true", 1), ("expressive:softmax_layers=[1]", 2)],
)
def test_layers_compile_once(
    corpus: Path, attention: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph serves all layers of a kind, and gives the loss and gradients of no graph."""
    options = recipe.ModelOptions(attention=attention, width=32, heads=4, layers=4)
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return aot_eager(graph, inputs)

    def compile_layer(self: torch.nn.Module) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, fullgraph=True, backend=backend)

    text = read(corpus, documents="joined")
    torch.manual_seed(0)
    model: Any = Attention.parse(attention).causal_lm(recipe.model_config(options, text))
    batch = next(iter(text.validation_loader(4)))
    torch.compiler.reset()
    found = []
    for how in ("no", "layers"):
        monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
        recipe.compile_model(model, how)
        loss = recipe.mean_loss(model, batch)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1])
    assert len(seen) == graphs


def test_layers_that_nobody_marked_are_not_compiled() -> None:
    class Bare(torch.nn.Module):
        config = LlamaConfig()

    with pytest.raises(ValueError, match="--compile layers finds no layers in llama"):
        recipe.compile_model(Bare(), "layers")  # type: ignore[arg-type]


def test_text_under_the_same_name_is_told_apart(corpus: Path) -> None:
    told = read(corpus).fingerprint()
    size = sum(path.stat().st_size for path in (corpus / "tales").glob("*.txt"))
    assert f"40 documents of {size} bytes" in told
    assert told == read(corpus).fingerprint()
    assert told != read(corpus, validation_documents=6).fingerprint()
    assert read_stream(corpus).fingerprint() == ""


def test_operations_of_a_token_by_hand() -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    norms = 3 * 2 * 16 + 16
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    assert recipe.flops_per_token(model, 100) == (
        6 * (3 * layer + norms + 300 * 16) + 6 * 3 * 16 * 100
    )


def test_what_a_mechanism_learns_does_not_decay() -> None:
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="expressive", hf_expressive=ExpressiveConfig(scale="learned")
    )
    decayed, kept = (set(map(id, group["params"])) for group in parameter_groups(model, 0.1))
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    for name, key in names.items():
        assert (key in kept) == ("mechanism" in name or "norm" in name), name
    assert len(decayed) + len(kept) == len(names)


def small_loop(accelerator: Accelerator, factor: float, steps: int) -> Loop:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Loop(
        accelerator,
        model,
        accelerator.prepare(optimizer),
        torch.optim.lr_scheduler.ConstantLR(optimizer),
        loss=lambda module, batch: module(batch).mean() * factor,
        measure=lambda module: {"loss": 0.0},
        training=TrainingOptions(steps=steps),
        title="small",
        samples=1,
    )


def test_loss_that_is_no_number_ends_the_run() -> None:
    loop = small_loop(Accelerator(cpu=True), torch.nan, steps=5)
    with pytest.raises(FloatingPointError, match="the training loss is nan at step 5"):
        loop.run([torch.ones(1, 1)] * 5)


@pytest.mark.parametrize("factor", [1.0, torch.nan])
def test_what_is_gathered_after_a_run_is_whole(factor: float) -> None:
    """Also where the run ended at a loader's last batch, which is smaller than the others."""
    accelerator = Accelerator(cpu=True)
    batches = accelerator.prepare(DataLoader(torch.ones(10, 1), batch_size=4))
    with contextlib.suppress(FloatingPointError):
        small_loop(accelerator, factor, steps=3).run(batches)
    assert len(accelerator.gather_for_metrics(torch.ones(7))) == 7


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "sentence"),
    [
        (TextOptions, {"length": 1}, "--length must be at least 2, got 1"),
        (TextOptions, {"dataset": "a", "train_files": ["b"]}, "either --dataset or --train_files"),
        (TextOptions, {"validation_files": ["b"]}, "--validation_files goes with --train_files"),
        (TextOptions, {"streaming": True}, "--streaming needs --dataset or --train_files"),
        (recipe.ModelOptions, {"heads": 3}, "--heads must divide 256, got 3"),
        (recipe.ModelOptions, {"kv_heads": 3}, "--kv_heads must divide 4, got 3"),
        (recipe.ModelOptions, {"architecture": "bert2"}, "bert2 has no causal language model"),
        (recipe.ModelOptions, {"attention": "softmax"}, "--attention must be one of"),
        (recipe.ModelOptions, {"config_overrides": ["a"]}, "expected name=value, got 'a'"),
        (recipe.PretrainOptions, {"log_every": 0}, "--log_every must be at least 1"),
        (recipe.PretrainOptions, {"adam_betas": [0.9]}, "--adam_betas takes two numbers"),
        (recipe.RunOptions, {"resume": True, "overwrite": True}, "exclude each other"),
        (recipe.RunOptions, {"checkpoint_every": 0}, "--checkpoint_every must be at least 1"),
    ],
)
def test_bad_options_are_refused_by_name(options: type, values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        options(**values)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train_files": ["no-such-file"]}, "no file matches no-such-file"),
        ({"validation_documents": 40}, "has only 40 documents; --validation_documents 40"),
    ],
)
def test_text_that_is_not_there(corpus: Path, options: dict[str, Any], sentence: str) -> None:
    given = {"train_files": [str(corpus / "tales" / "*.txt")], **options}
    with pytest.raises(ValueError, match=sentence):
        Text(TextOptions(**given))


def test_missing_column_is_named(corpus: Path) -> None:
    with pytest.raises(ValueError, match="no column text; it has words"):
        Text(TextOptions(train_files=[str(corpus / "tales.jsonl")]))


def test_unknown_field_of_the_config(corpus: Path) -> None:
    options = recipe.ModelOptions(config_overrides=["rope=1"])
    with pytest.raises(ValueError, match="llama has no field rope"):
        recipe.model_config(options, read(corpus))


def test_help_explains_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    with pytest.raises(SystemExit) as end:
        recipe.main()
    assert end.value.code == 0
    told = capsys.readouterr().out
    groups = (TextOptions, recipe.ModelOptions, recipe.PretrainOptions, recipe.RunOptions)
    for group in groups:
        for field in fields(group):
            assert f"--{field.name}" in told
            assert len(field.metadata["help"]) > 10


# ---- whole runs ----------------------------------------------------------------------------------


def tiny(corpus: Path, folder: Path, *options: str, streaming: bool = False) -> list[str]:
    """A run of 40 steps."""
    files = "tales.jsonl" if streaming else "tales/*.txt"
    return [
        *("--train_files", str(corpus / files), "--validation_documents", "5", "--length", "32"),
        *("--width", "16", "--layers", "2", "--heads", "2", "--batch_size", "4", "--steps", "40"),
        *("--warmup_steps", "5", "--learning_rate", "1e-2", "--evaluate_every", "10"),
        *("--log_every", "2", "--checkpoint_every", "3", "--output_dir", str(folder)),
        *(["--streaming", "--text_column", "words"] if streaming else []),
        *options,
    ]


LEARNED = ("--attention", "expressive:scale=learned,sink=true,gain=0.5")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def losses(folder: Path) -> dict[str, list[float]]:
    curve = results(folder)["runs"][0]["curve"]
    assert curve["step"] == [0, 10, 20, 30, 40]
    return {key: curve[key] for key in ("loss", "train_loss")}


def newest(folder: Path) -> int:
    """Step of the newest whole checkpoint, 0 without one."""
    steps = [int(p.name.removeprefix("step-")) for p in folder.glob("checkpoints/step-*")]
    return max(steps, default=0)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "one"
    done = launch(ONE, "pretrain.py", *tiny(corpus, folder, *LEARNED))
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    return folder


def test_run_learns_and_leaves_everything(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "settings.json",
        "results.json",
        "loss.png",
        "model",
    }
    found = results(finished)
    run = found["runs"][0]
    curve = run["curve"]
    assert curve["loss"][0] > 5.4
    assert curve["loss"][-1] < 3.0, "nothing was learned; letters alone have about 2.9 nats"
    assert curve["perplexity"][-1] == pytest.approx(np.exp(curve["loss"][-1]))
    assert curve["train_loss"][0] is None
    assert all(rate > 0 for rate in curve["tokens_per_second"][1:])
    assert found["settings"]["kv_heads"] == 2
    resolved = json.loads((finished / "settings.json").read_text())
    assert resolved["settings"] == found["settings"]
    assert resolved["environment"]["versions"]["torch"] == torch.__version__

    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.config._attn_implementation == "expressive"
    sinks = [p for name, p in model.named_parameters() if name.endswith("sink.log_weight")]
    assert len(sinks) == 2
    assert all((sink != 0).all() for sink in sinks), "the sinks were not trained"
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer("fox")["input_ids"] == list(b"fox")
    assert (finished / "model" / "README.md").exists()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_the_model_of_one(
    kind: str, corpus: Path, finished: Path, tmp_path: Path
) -> None:
    """FSDP2 is killed on the way, too, and goes on from its sharded checkpoint."""
    command = tiny(corpus, tmp_path, *LEARNED)
    launcher = TWO
    if kind == "fsdp2":
        launcher = SHARDED
        code = launch_and_interrupt(
            *(launcher, str(RECIPES / "pretrain.py"), *command),
            signal=signal.SIGKILL,
            when=lambda: newest(tmp_path) > 0,
        )
        assert code == -signal.SIGKILL
        command.append("--resume")
    done = launch(launcher, str(RECIPES / "pretrain.py"), *command)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path)["environment"]["hardware"]["processes"] == 2
    one = losses(finished)
    two = losses(tmp_path)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert two["train_loss"][1:] == pytest.approx(one["train_loss"][1:], abs=1e-4)
    names = {"model.safetensors", "config.json", "tokenizer.json"}
    assert names <= {path.name for path in (tmp_path / "model").iterdir()}


def test_stopped_run_goes_on_as_if_it_had_not_been(corpus: Path, tmp_path: Path) -> None:
    """A stream, dropout and random frequencies' dropout: everything that has a state.

    Killed at one checkpoint, stopped by a signal later, and still the same to the last bit.
    """
    noisy = (
        *("--attention", "implicit_kernel", "--architecture", "gpt2"),
        *("--config_overrides", "resid_pdrop=0.1"),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = launch((), "pretrain.py", *tiny(corpus, whole, *noisy, streaming=True))
    assert done.returncode == 0, done.stderr

    command = tiny(corpus, parts, *noisy, streaming=True)
    code = launch_and_interrupt(
        *((), "pretrain.py", *command), signal=signal.SIGKILL, when=lambda: newest(parts) > 0
    )
    assert code == -signal.SIGKILL
    reached = newest(parts)
    assert 0 < reached < 40

    refused = launch((), "pretrain.py", *command)
    assert refused.returncode == 1
    assert "holds checkpoints of an unfinished run; pass --resume" in refused.stderr
    command.append("--resume")
    code = launch_and_interrupt(
        *((), "pretrain.py", *command), signal=signal.SIGTERM, when=lambda: newest(parts) > reached
    )
    assert code == 128 + signal.SIGTERM
    assert reached < newest(parts) < 40
    assert not (parts / "results.json").exists()

    other = launch((), "pretrain.py", *command, "--learning_rate", "1e-3")
    assert other.returncode == 1
    assert "had other settings: --learning_rate 0.01" in other.stderr
    done = launch((), "pretrain.py", *command)
    assert done.returncode == 0, done.stderr
    assert losses(parts) == losses(whole)
    assert not (parts / "checkpoints").exists()


def test_published_command_lines_are_accepted() -> None:
    """Every `accelerate launch recipes/pretrain.py …` of the recipes' page parses."""
    from transformers import HfArgumentParser

    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"recipes/pretrain\.py([^\n`]*)", page)
    assert len(commands) >= 3
    parser = HfArgumentParser(
        [TextOptions, recipe.ModelOptions, recipe.PretrainOptions, recipe.RunOptions]  # type: ignore[arg-type]
    )
    for command in commands:
        parser.parse_args_into_dataclasses([word.strip("'") for word in command.split()])
