"""Training the kernels' parameters: data parallel, sharded, from the meta device, with Trainer."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import REPOSITORY
from tolerances import largest_error
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_expressive.attention import implicit_kernel
from hf_expressive.auxiliary import auxiliary_loss

sys.path.insert(0, str(Path(__file__).parent))
import distributed_kernel

SCRIPT = Path(__file__).parent / "distributed_kernel.py"
WAYS = ["ddp", "fsdp", "fsdp-meta"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank of each way has; two processes that talk to each other through gloo."""
    folder = tmp_path_factory.mktemp("distributed")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", str(SCRIPT), ",".join(WAYS), str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = {
        way: [torch.load(path) for path in sorted(folder.glob(f"{way}-?.pt"))] for way in WAYS
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.ones_like)
        model = distributed_kernel.prepare("plain")
        return {"plain": [distributed_kernel.train(model, "plain", 0, 1)], **results}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(trained: dict[str, list[Any]], way: str) -> None:
    """Losses with the regulariser, gradients over micro-batches, the model after two steps."""
    (plain,) = trained["plain"]
    assert plain["losses"][1] < plain["losses"][0]
    assert len(trained[way]) == 2
    for rank in trained[way]:
        assert torch.allclose(rank["losses"], plain["losses"], rtol=1e-5)
        for part in ("gradients", "state"):
            assert rank[part].keys() == plain[part].keys()
            for name, expected in plain[part].items():
                assert largest_error(rank[part][name], expected) < 1e-5, name


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_hold_the_same_model(trained: dict[str, list[Any]], way: str) -> None:
    first, second = trained[way]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


def test_the_mechanism_is_trained(trained: dict[str, list[Any]]) -> None:
    (plain,) = trained["plain"]
    start = distributed_kernel.build().state_dict()
    own = [name for name, _ in distributed_kernel.build().named_parameters() if "mechanism" in name]
    assert len(own) == 2 * 16
    for name in own:
        assert plain["gradients"][name].any(), name
        assert not torch.equal(plain["state"][name], start[name]), name


# ---- Trainer --------------------------------------------------------------------------------------


def documented_class(text: str | None, name: str) -> type[Trainer]:
    """A class written down in a docstring."""
    assert text is not None
    lines = text[text.index(f"    class {name}") :].splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    names: dict[str, Any] = {"Trainer": Trainer, "auxiliary_loss": auxiliary_loss}
    exec(textwrap.dedent("\n".join(lines[:end])), names)
    return names[name]


@pytest.mark.parametrize("by_tokens", [True, False])
def test_trainer_adds_the_regulariser_once_a_step(
    by_tokens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step over two micro-batches is a step on their mean loss plus the regulariser once."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    rows = distributed_kernel.ROWS
    data = [{"input_ids": row, "labels": row} for row in rows]

    expected = distributed_kernel.build().train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    mean_loss = torch.stack([expected(input_ids=r, labels=r).loss for r in rows.split(4)]).mean()
    (mean_loss + auxiliary_loss(expected) / len(data)).backward()
    optimizer.step()

    model = distributed_kernel.build()
    model.accepts_loss_kwargs = by_tokens
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    documented = documented_class(inspect.getdoc(auxiliary_loss), "RegularizedTrainer")
    trainer = documented(
        model, arguments, train_dataset=data, eval_dataset=data[:4], data_collator=_in_order
    )
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda *_: None)
    trainer.train()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert largest_error(ours.detach(), theirs.detach()) < 1e-5, name
    with torch.no_grad():
        alone = model.eval()(input_ids=rows[:4], labels=rows[:4]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(alone), rel=1e-5)


def _in_order(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_weight_decay_leaves_the_mechanism_out_as_documented(tmp_path: Path) -> None:
    model = distributed_kernel.build()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    documented = documented_class(inspect.getdoc(implicit_kernel), "MyTrainer")
    decayed = {
        trainer: set(trainer(model, arguments).get_decay_parameter_names(model))
        for trainer in (Trainer, documented)
    }
    own = {name for name, _ in model.named_parameters() if ".mechanism." in name}
    assert len(own & decayed[Trainer]) > 10
    assert decayed[documented] == decayed[Trainer] - own


# ---- gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_a_regulariser_that_lost_its_gradient_is_refused() -> None:
    model = distributed_kernel.build().train()
    enable = functools.partial(model.gradient_checkpointing_enable)
    enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    rows = distributed_kernel.ROWS
    loss = model(input_ids=rows, labels=rows).loss
    with pytest.raises(RuntimeError, match=r"use_reentrant.: False"):
        loss + auxiliary_loss(model)
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=rows)
    assert auxiliary_loss(model).requires_grad
    with torch.no_grad():
        model(input_ids=rows)
        assert float(auxiliary_loss(model)) > 0.0
    assert float(auxiliary_loss(model.eval()).detach()) > 0.0
