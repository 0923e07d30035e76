"""The closeness recipe: its two errors against their definition, what it writes, and what it finds."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch
from launching import RECIPES
from tolerances import largest_error

sys.path.insert(0, str(RECIPES))

import closeness as recipe

from hf_expressive.ops.implicit_kernel import implicit_kernel_attention


def test_errors_are_those_of_the_attention_itself() -> None:
    """The weights are what attention gives values that tell the keys apart."""
    query, key = torch.randn(2, 1, 1, 9, 4, dtype=torch.float64)
    frequencies = 0.1 * torch.randn(1, 2, 4, 12, dtype=torch.float64)
    value = torch.eye(9, dtype=torch.float64)[None, None]
    ours = implicit_kernel_attention(query, key, value, frequencies=frequencies, epsilon=0.3)
    softmax = implicit_kernel_attention(query, key, value)
    assert largest_error(softmax, torch.softmax(query @ key.mT / 2.0, dim=-1)) < 1e-12
    found = recipe.errors(frequencies, query, key, epsilon=0.3)
    expected = 0.5 * (ours - softmax).abs().sum(dim=-1).mean()
    assert found["weight_elsewhere"] == pytest.approx(float(expected), abs=1e-9)
    kernel = torch.zeros(9, 9, dtype=torch.float64)
    for s in range(2):
        for t in range(2):
            angles = [
                2 * math.pi * (x[0, 0] @ frequencies[0, u]) for x, u in ((query, s), (key, t))
            ]
            kernel += (angles[0][:, None] - angles[1][None]).cos().mean(dim=-1) / 4
    rbf = torch.exp(-(torch.cdist(query, key)[0, 0] ** 2) / 8)
    rms = (kernel - rbf).square().mean().sqrt()
    assert found["kernel_error"] == pytest.approx(float(rms), abs=1e-9)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("closeness")
    argv = [
        "closeness.py",
        "--head_dims",
        "16",
        "--lengths",
        "0.5",
        "--features",
        "16",
        "64",
        "256",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, "--seeds", "3", "--output_dir", str(folder)])
        recipe.main()
        with pytest.raises(SystemExit, match="pass --overwrite"):
            recipe.main()
    assert (folder / "closeness.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "results.json").read_text())


def test_error_falls_with_the_root_of_the_features(record: dict[str, Any]) -> None:
    for curve in record["curves"]:
        for rate in curve["rates"].values():
            assert rate == pytest.approx(-0.5, abs=0.1)
    assert len(record["curves"]) == 4
    assert "--features 16 64 256 --keys 128 --seeds 3" in record["command"]


def test_orthogonal_frequencies_are_closer(record: dict[str, Any]) -> None:
    curves = {(c["kernel"], c["init"]): c["entries"] for c in record["curves"]}
    for kernel in ("stationary", "direct"):
        pairs = zip(curves[kernel, "gaussian"], curves[kernel, "orthogonal"], strict=True)
        for gaussian, orthogonal in pairs:
            low, high = orthogonal["weight_elsewhere"], gaussian["weight_elsewhere"]
            assert low["high"] < high["low"]
            assert low["mean"] < 0.6 * high["mean"]


def test_bad_options_are_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["closeness.py", "--features", "0"])
    with pytest.raises(SystemExit):
        recipe.main()
    assert "--features must be positive numbers, got [0]" in capsys.readouterr().err


def test_published_figures_are_those_of_the_docstring() -> None:
    from hf_expressive.attention.spectral_density import LearnedFrequencies

    published = json.loads((RECIPES / "results" / "closeness.json").read_text())
    lines = str(LearnedFrequencies.__doc__).splitlines()
    count = 0
    for curve in published["curves"]:
        if curve["kernel"] != "stationary":
            continue
        words = [f"{curve['head_dim']}", f"{curve['length']:g}", curve["init"]]
        means = [f"{e['weight_elsewhere']['mean']:.3f}" for e in curve["entries"][1:]]
        words += [*means, f"M^{curve['rates']['weight_elsewhere']:.2f}"]
        assert words in [line.split() for line in lines], words
        count += 1
    assert count == 8
