"""The interpretation recipe on models that are trained here for two steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import RECIPES

sys.path.insert(0, str(RECIPES))

import interpret as recipe
import nt_prediction
from reporting import Record

from hf_expressive import analysis

KINDS = ["sdpa", "expressive", "implicit_kernel:kernel=direct"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        sizes = "--basis 8 --layers 2 --heads 2 --width 8 --train_size 64 --validation_size 32"
        steps = "--steps 2 --batch_size 16 --evaluate_every 2 --seeds 0"
        patch.setenv("ACCELERATE_USE_CPU", "true")
        argv = ["nt_prediction.py", *sizes.split(), *steps.split(), "--attention", *KINDS]
        patch.setattr(sys, "argv", [*argv, "--output_dir", str(folder)])
        nt_prediction.main()
    return folder / "results.json"


def test_numbers_and_pictures_are_those_of_analysis(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = ["interpret.py", "--record", str(trained), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*argv, "--sequences", "5"])
    recipe.main()
    content = json.loads((tmp_path / "results.json").read_text())
    assert [run["variant"] for run in content["runs"]] == KINDS
    record = Record.load(trained)
    task = nt_prediction.TaskOptions(basis=8, train_size=64, validation_size=32)
    ids = nt_prediction.nt_dataset(task, 0)["validation"][:5]["input_ids"]
    for run, written in zip(record.runs, content["runs"], strict=True):
        model = recipe.load(run, trained.parent)
        expected = analysis.antiparallel_mass(model, input_ids=ids)
        assert written["antiparallel"].keys() == expected.keys()
        for name, mass in expected.items():
            assert written["antiparallel"][name] == pytest.approx(mass.tolist())
        assert bool(written["kernels"]) == (run.variant == KINDS[2])
    samples = analysis.spectral_samples(model, input_ids=ids)
    for name, found in written["kernels"].items():
        rms = samples[name].square().sum(2).mean((1, 2)).sqrt()
        assert found["frequency_rms"] == pytest.approx(rms.tolist())
    pictures = {path.name for path in tmp_path.glob("*.png")}
    mark = "implicit_kernel-kernel-direct.png"
    assert pictures == {"antiparallel.png", f"kernels-{mark}", f"spectral_density-{mark}"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert "share of attention weight" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pass --overwrite"):
        recipe.main()


def test_what_is_missing_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["interpret.py", "--output_dir", str(tmp_path / "none"), "--record"]
    for given, sentence in (
        ([str(tmp_path / "x.json")], "run recipes/nt_prediction.py first"),
        ([str(trained), "--seed", "3"], "holds no run of nt_prediction.py with seed 3"),
    ):
        monkeypatch.setattr(sys, "argv", [*argv, *given])
        with pytest.raises(SystemExit, match=sentence):
            recipe.main()


def test_half_width_is_where_the_kernel_first_falls_to_one_half() -> None:
    distances = torch.tensor([0.0, 1.0, 2.0, 3.0])
    profile = torch.tensor([[1.0, 0.6, 0.5, 0.9], [0.8, 0.3, 0.5, 0.1], [1.0, 0.9, 0.8, 0.7]])
    assert recipe.half_width(profile, distances) == [2.0, 1.0, None]
