"""The ladder: stacked models are the models they stand for, sequences, whole runs, configurations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from launching import RECIPES

sys.path.insert(0, str(RECIPES))

import nt_ladder as recipe
import nt_prediction
from arguments import Attention
from stacked import Stacked

KINDS = [
    "sdpa",
    "expressive:scale=learned,power=2,sink=true",
    "implicit_kernel:norm_dropout=0,num_features=6",
    "implicit_kernel:kernel=rbf,norm_dropout=0,p=learned",
]


def model(architecture: str, attention: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = nt_prediction.model_config(
        nt_prediction.ModelOptions(architecture=architecture, width=12, heads=3),  # type: ignore[arg-type]
        nt_prediction.TaskOptions(basis=8, delay=5, length=20, train_size=1, validation_size=1),
    )
    return Attention.parse(attention).causal_lm(config)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_models_train_as_they_would_alone(architecture: str, kind: str) -> None:
    alone = [model(architecture, kind, seed) for seed in range(2)]
    stacked = Stacked([alone[1], alone[0], alone[1]], Attention.parse(kind))
    replicas = [model(architecture, kind, seed) for seed in (1, 0, 1)]
    ids = torch.randint(0, 8, (2, 3, 4, 20))
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-2) for one in (stacked, *replicas)]
    for batch in ids:
        losses = [
            torch.nn.functional.cross_entropy(
                stacked(batch)[number, :, :-1].flatten(0, 1), batch[number, :, 1:].flatten()
            )
            for number in range(3)
        ]
        expected = [
            one(input_ids=own, labels=own, use_cache=False).loss
            for one, own in zip(replicas, batch, strict=True)
        ]
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), atol=1e-4, rtol=1e-4)
        torch.stack(losses).sum().backward()
        for loss in expected:
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.allclose(losses[0], losses[2]), "equal weights, but other sequences"
    for number, one in enumerate(replicas):
        weights = stacked.replica(number)
        loaded = model(architecture, kind, 5)
        loaded.load_state_dict(weights)
        with torch.no_grad():
            found, wanted = (m(input_ids=ids[0, number]).logits for m in (loaded, one))
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


def test_parameters_in_common_are_refused() -> None:
    kind = "implicit_kernel:kernel=implicit,num_features=4"
    with pytest.raises(ValueError, match="belongs to all heads in common"):
        Stacked([model("gpt2", kind, 0)] * 2, Attention.parse(kind))


def sequences(multi: bool) -> recipe.Sequences:
    bases = torch.tensor([4, 16, 2, 16]) if not multi else torch.tensor([4, 16])
    delays = torch.tensor([2, 5, 3, 3]) if not multi else torch.tensor([2, 3, 5])
    return recipe.Sequences(bases, delays, multi, length=12, seed=1)


def test_sequences_obey_their_recurrence() -> None:
    data = sequences(multi=False)
    ids, determined = data.draw(50)
    for number, (basis, delay) in enumerate([(4, 2), (16, 5), (2, 3), (16, 3)]):
        assert ids[number].max() == basis - 1
        assert determined[number].int().sum(-1).tolist() == [12 - delay] * 50
        for row in ids[number].tolist():
            for t in range(delay, 12):
                assert row[t] == (row[t - 1] + row[t - delay]) % basis


def test_several_tasks_name_their_delay() -> None:
    data = sequences(multi=True)
    ids, determined = data.draw(60)
    for number, basis in enumerate((4, 16)):
        assert set(ids[number, :, 0].tolist()) == {16, 17, 18}
        for row, known in zip(ids[number].tolist(), determined[number].tolist(), strict=True):
            delay = (2, 3, 5)[row[0] - 16]
            assert known == [False] * (1 + delay) + [True] * (12 - delay)
            for t in range(delay + 1, 13):
                assert row[t] == (row[t - 1] + row[t - delay]) % basis
    even, _ = data.draw(60, validation=True)
    assert even[0, :, 0].bincount()[16:].tolist() == [20, 20, 20]


def test_what_is_measured_on_is_not_trained_on() -> None:
    bases, delays = torch.tensor([8, 4]), torch.tensor([4, 2])
    data = recipe.Sequences(bases, delays, False, length=9, seed=3)
    trained, _ = data.draw(4000)
    measured, _ = data.draw(400, validation=True)
    heads = [{tuple(row[:4]) for row in part[0].tolist()} for part in (trained, measured)]
    assert len(heads[0]) > 2000
    assert not heads[0] & heads[1]
    # Of 16 sequences none can be set aside.
    heads = [{tuple(row[:2]) for row in part[1].tolist()} for part in (trained, measured)]
    assert heads[0] == heads[1]
    assert len(heads[0]) == 16


SMALL = [
    *("--bases", "2", "4", "--delays", "2", "3", "--widths", "8", "--steps", "60", "--seeds", "2"),
    *("--batch_size", "32", "--evaluate_every", "30", "--validation_size", "64"),
    *("--attention", "sdpa", "expressive", "--learning_rate", "1e-2"),
]


def test_run_is_resumed_by_groups_and_draws_heat_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(*options: str) -> None:
        monkeypatch.setattr(
            sys, "argv", ["nt_ladder.py", *SMALL, "--output_dir", str(tmp_path), *options]
        )
        recipe.main()

    call("--share", "1/2")
    assert "4 of 8 groups are left" in capsys.readouterr().out.replace("\n", " ")
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "groups").iterdir()}
    assert len(first) == 4
    call("--share", "2/2")
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["groups"]) == len(results["summary"]) == 8
    for entry in results["groups"]:
        assert set(entry["accuracy"]) == {"2,2", "2,3", "4,2", "4,3"}
        assert all(len(values) == 2 for values in entry["accuracy"].values())
        assert entry["curve"][-1]["step"] == 60
    found = {
        tuple(entry["group"].values()): entry["accuracy"]["2,2"] for entry in results["groups"]
    }
    assert max(found["sdpa", "rotary", 8, "single"]) > 0.8, "x_t = x_(t-1) xor x_(t-2) is easy"
    names = {
        f"{setting}-{kind}.png"
        for setting in ("single", "multi")
        for kind in ("absolute", "rotary")
    }
    assert names <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="groups of other options"):
        call("--steps", "70")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"bases": [3]}, "--bases must be powers of two from 2 on, got 3"),
        ({"delays": [1]}, "--delays must be at least 2, got 1"),
        ({"length": 8}, "--length must exceed the longest delay, 8"),
        ({"widths": [7]}, "--widths must be multiples of twice --heads"),
        ({"positions": ["learned"]}, "--positions must be of absolute, rotary"),
        ({"share": "3/2"}, "--share must look like 2/3"),
    ],
)
def test_bad_options_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe.LadderOptions(**values)


# ---- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("cpu", "NO", 1),
        ("single_gpu", "NO", 1),
        ("ddp", "MULTI_GPU", 2),
        ("fsdp2", "FSDP", 2),
        ("deepspeed_zero3", "DEEPSPEED", 2),
        ("multi_node", "MULTI_GPU", 16),
    ],
)
def test_accelerate_reads_the_configuration(name: str, kind: str, processes: int) -> None:
    path = RECIPES / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert config.num_processes == processes
    assert config.mixed_precision == ("no" if name == "cpu" else "bf16")
    text = path.read_text(encoding="utf-8")
    assert f"--config_file recipes/configs/{name}.yaml" in text
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 3


def test_every_configuration_is_tested_and_on_the_page() -> None:
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in (RECIPES / "configs").glob("*.yaml"):
        assert f"`{path.name}`" in page
        assert path.stem in str(test_accelerate_reads_the_configuration.pytestmark)  # type: ignore[attr-defined]
