"""The command line, as a user calls it: what it prints, writes, publishes, and how it ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import TOKEN, HubStandIn
from tiny import llama, llava, logits, train_gains
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_expressive import ExpressiveConfig, attach
from hf_expressive.attention.base import Mechanism
from hf_expressive.cli import main

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "recipes" / "results" / "nt_prediction.json"

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A softmax checkpoint with a tokenizer."""
    path = tmp_path / "plain"
    llama().save_pretrained(path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    path = tmp_path / "variant"
    model = attach(llama(), ExpressiveConfig(scale="learned", power=2.0, softmax_layers=(1,)))
    train_gains(model)
    model.save_pretrained(path)
    return path


def test_info(variant: Path, plain: Path, capsys: Capture) -> None:
    assert main(["info", str(variant)]) == 0
    told = capsys.readouterr().out
    assert f"{llama().num_parameters() + 4:,} parameters, saved by hf_expressive" in told
    assert "power=2.0" in told
    rows = [line.split() for line in told.splitlines() if "self_attn" in line]
    assert [row[1] for row in rows] == ["expressive", "expressive"]
    assert rows[1][2:4] == ["all", "heads"]  # the layer that keeps softmax
    (variant / "model.safetensors").unlink()  # weights are not needed
    assert main(["info", str(variant)]) == 0
    assert main(["info", str(plain)]) == 0
    assert "sdpa" in capsys.readouterr().out


def test_info_of_a_composite_model(tmp_path: Path, capsys: Capture) -> None:
    model = llava()
    attach(model.model.language_model, ExpressiveConfig())
    model.save_pretrained(tmp_path / "llava")
    assert main(["info", str(tmp_path / "llava")]) == 0
    told = capsys.readouterr().out
    assert "saved by hf_expressive" in told
    rows = {line.split()[0]: line.split()[1] for line in told.splitlines() if "self_attn" in line}
    assert rows["model.language_model.layers.0.self_attn"] == "expressive"
    assert {ran for name, ran in rows.items() if "vision" in name} == {"sdpa"}


def test_verify(variant: Path, plain: Path, capsys: Capture) -> None:
    assert main(["verify", str(variant)]) == 0
    assert capsys.readouterr().out.count("passed") >= 6
    assert main(["verify", str(plain)]) == 2
    assert "runs no mechanism" in capsys.readouterr().err


def test_verify_says_no(variant: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the attention gives the report and exit code 1."""
    original = Mechanism.forward

    def wrong(self: Mechanism, call: Any) -> Any:
        out, weights = original(self, call)
        return (out if out.dtype == torch.float64 else out * 1.01), weights

    monkeypatch.setattr(Mechanism, "forward", wrong)
    assert main(["verify", str(variant)]) == 1
    assert "FAILED  exact" in capsys.readouterr().out


def test_convert(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    """The same weights with a mechanism on, and the tokenizer; nothing is trained, and it says so."""
    target = tmp_path / "new"
    options = ["--option", "power=2", "--option", "scale=learned", "--option", "softmax_layers=[0]"]
    assert main(["convert", str(plain), str(target), *options]) == 0
    assert "train them before they are of use" in capsys.readouterr().out
    config = ExpressiveConfig(power=2.0, scale="learned", softmax_layers=(0,))
    again = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits(again), logits(attach(llama(), config)))
    assert AutoTokenizer.from_pretrained(target)("3")["input_ids"] == [3]
    exact = [
        "--mechanism",
        "implicit_kernel",
        "--option",
        "kernel=rbf",
        "--option",
        "norm_dropout=0",
    ]
    assert main(["convert", str(plain), str(tmp_path / "rbf"), *exact]) == 0
    rbf = AutoModelForCausalLM.from_pretrained(tmp_path / "rbf")
    torch.testing.assert_close(logits(rbf), logits(llama()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--option", "power"], "--option must be NAME=VALUE, got 'power'"),
        (["--option", "powr=2"], "unknown option powr"),
        (["--option", "power=-1"], "power must be a positive number, got -1"),
        (["--mechanism", "implicit_kernel", "--option", "kernel=rbff"], "kernel must be one of"),
        (["--option", "softmax_layers=[7]"], "softmax_layers contains 7"),
    ],
)
def test_convert_refuses(
    options: list[str], message: str, plain: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["convert", str(plain), str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_convert_overwrites_nothing(plain: Path, variant: Path, capsys: Capture) -> None:
    before = {path.name: path.read_bytes() for path in variant.iterdir()}
    assert main(["convert", str(plain), str(variant)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in variant.iterdir()} == before


def test_card(tmp_path: Path, capsys: Capture) -> None:
    """From the record alone, onto the terminal or into a folder; what is unknown is told apart."""
    assert main(["card", str(RESULTS)]) == 0
    told = capsys.readouterr()
    published = (REPOSITORY / "model_cards" / "nt-16-5-expressive.md").read_text(encoding="utf-8")
    assert told.out == published + "\n"
    assert "not known, so not in the card: license" in told.err
    assert main(["card", str(RESULTS), "--output", str(tmp_path), "--license", "mit"]) == 0
    written = (tmp_path / "nt-16-5-expressive.md").read_text(encoding="utf-8")
    assert "license: mit" in written
    assert "license" not in capsys.readouterr().err


def test_card_needs_a_record(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "no.json").write_text("{", encoding="utf-8")
    for path in (tmp_path / "no.json", tmp_path / "nowhere.json"):
        assert main(["card", str(path)]) == 2
        assert capsys.readouterr().err.startswith("hf-expressive card: error: ")


def test_kernel(tmp_path: Path, capsys: Capture) -> None:
    assert main(["kernel", str(tmp_path / "kernel")]) == 0
    assert "hf upload" in capsys.readouterr().out
    assert (tmp_path / "kernel" / "build" / "torch-cuda" / "__init__.py").exists()
    assert main(["kernel", str(tmp_path / "kernel")]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["nothing there", "truncated", "no model"])
def test_what_cannot_be_loaded(what: str, variant: Path, capsys: Capture) -> None:
    name, expected = str(variant), "is incomplete or damaged"
    if what == "nothing there":
        name, expected = str(variant / "deeper" / "still"), "still"
    elif what == "truncated":
        file = variant / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    else:
        written = json.loads((variant / "config.json").read_text(encoding="utf-8"))
        written["architectures"] = ["HfExpressiveNoSuchModel"]
        (variant / "config.json").write_text(json.dumps(written), encoding="utf-8")
        expected = "no model class of Transformers"
    assert main(["verify", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-expressive verify: error: ")
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([name, "--help"] for name in ("info", "push", "card"))],
)
def test_help(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["convert", "x"], ["info", "x", "--seed", "1"]])
def test_wrong_usage(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: hf-expressive" in capsys.readouterr().err


def test_push_in_a_process_of_its_own(variant: Path, tmp_path: Path) -> None:
    """As on a shell: endpoint and token from the environment, progress on the terminal."""
    arguments = ["push", str(variant), "me/shell", "--license", "mit", "--private"]
    with HubStandIn() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "hf_expressive.cli", *arguments],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]),
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": TOKEN,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (
            done.stdout.strip()
            == f"{hub.url}/me/shell/commit/" + (hub.repositories["me/shell"].branches["main"])
        )
        assert "100%" in done.stderr
        assert "not known, so not in the card: base_model" in done.stderr
        assert hub.repositories["me/shell"].private
        assert b"license: mit" in hub.files("me/shell")["README.md"]
        assert (
            hub.files("me/shell")["model.safetensors"]
            == (variant / "model.safetensors").read_bytes()
        )


def test_entry_points_name_what_exists() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (plugin,) = project["entry-points"]["vllm.general_plugins"].values()
    module, function = plugin.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert project["scripts"] == {"hf-expressive": f"{main.__module__}:{main.__name__}"}
