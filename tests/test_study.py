"""The comparison of many runs: settings, what is collected of them, and that no device waits."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import RECIPES

sys.path.insert(0, str(RECIPES))

import study
from reporting import Record, Run
from study import SETTINGS, Job, Setting


def test_default_settings_are_distinct_and_contain_softmax() -> None:
    parsed = [Setting.parse(text) for text in SETTINGS]
    assert len({(one.architecture, one.attention) for one in parsed}) == len(parsed)
    assert len({one.name for one in parsed}) == len(parsed)
    assert sum(one.attention == "sdpa" for one in parsed) == 2


@pytest.mark.parametrize("text", ["softmax", "name=llama", "name=llama/expressive:strength=2"])
def test_a_setting_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        Setting.parse(text)


def write(job: Job, losses: list[float], finished: bool) -> None:
    """What pretrain.py leaves of a run with these losses at steps 0, 10, 20, …"""
    steps = [10 * i for i in range(len(losses))]
    curve: dict[str, Any] = {"step": steps, "loss": losses}
    settings = {"steps": 20, "tokenizer": None, "seed": job.seed, "attention": "its own"}
    job.folder.mkdir(parents=True)
    given = {"settings": settings, "environment": {"versions": {}}}
    (job.folder / "settings.json").write_text(json.dumps(given))
    (job.folder / "curve.json").write_text(json.dumps(curve))
    if finished:
        run = Run(
            variant="its name there",
            attention={},
            seed=job.seed,
            parameters=5,
            seconds=1.0,
            curve=curve,
            final={"loss": losses[-1]},
        )
        task = {"metric": {"key": "loss"}, "dataset": {"name": "text"}}
        Record(recipe="pretrain", task=task, runs=[run], **given).save(job.folder / "results.json")


def test_unfinished_runs_are_compared_where_all_of_a_setting_have_been(tmp_path: Path) -> None:
    settings = [Setting("softmax", "llama", "sdpa"), Setting("ours", "qwen3", "expressive")]
    jobs = [Job(one, seed, tmp_path / f"{one.name}-{seed}") for seed in (0, 1) for one in settings]
    assert study.collect(jobs, settings, tmp_path) is None
    write(jobs[0], [5.0, 2.0, 1.0], finished=True)
    write(jobs[1], [5.0, 3.0], finished=False)
    write(jobs[2], [5.0, 2.2, 1.2], finished=True)
    write(jobs[3], [5.0, 3.4, 0.5], finished=True)
    record = study.collect(jobs, settings, tmp_path)
    assert record is not None
    assert record == replace(Record.load(tmp_path / "results.json"), runs=record.runs)
    assert record.task["dataset"] == {"name": "text"}
    assert not {"attention", "seed"} & set(record.settings)
    softmax, ours = record.task["comparison"]
    assert (softmax["step"], softmax["losses"]) == (20, [1.0, 1.2])
    # Its first seed has been at step 10 only, so that is where it is compared.
    assert (ours["step"], ours["losses"]) == (10, [3.0, 3.4])
    assert ours["best_softmax"] == pytest.approx(2.1)
    assert [row["setting"] for row in study.in_order(record)] == ["softmax", "ours"]
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_every_place_is_taken_at_once_and_finished_runs_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices with two places each; the ninth run is there already."""
    setting, events = Setting("softmax", "llama", "sdpa"), []
    jobs = [Job(setting, seed, tmp_path / str(seed)) for seed in range(9)]
    write(jobs[8], [1.0], finished=True)

    class Process:
        """Ends when it is asked for the second time."""

        returncode = 0

        def __init__(self, job: Job, device: str) -> None:
            self.asked, self.device = 0, device
            events.append(device)

        def poll(self) -> int | None:
            self.asked += 1
            return 0 if self.asked > 1 else None

        def send_signal(self, number: int) -> None:
            raise AssertionError("nothing is left running")

    monkeypatch.setattr(study, "start", lambda job, options, device: Process(job, device))
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    study.run_all(jobs, [], ["0", "1"], 2, float("inf"), lambda: events.append("collected"))
    assert events == ["0", "1"] * 2 + ["0", "1"] * 2 + ["collected"]
