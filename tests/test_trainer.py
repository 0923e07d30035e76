"""Variants under other people's training loops and harnesses, unchanged: Trainer, TRL, lm-eval."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from launching import RECIPES
from tiny import llama
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_expressive import ExpressiveConfig, ImplicitKernelConfig, attach

sys.path.insert(0, str(RECIPES))

from text import byte_tokenizer

TEXTS = [f"verse {number}: the same again and again and again" for number in range(24)]
MECHANISMS = pytest.mark.parametrize(
    "config",
    [ExpressiveConfig(scale="learned", sink=True), ImplicitKernelConfig(num_features=8)],
    ids=["expressive", "implicit_kernel"],
)


def variant(config: Any) -> PreTrainedModel:
    return attach(llama(vocab_size=257), config)


def learned(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {n: p.detach().clone() for n, p in model.named_parameters() if ".mechanism." in n}
    assert found
    return found


def check(trainer: Trainer, model: PreTrainedModel, folder: Path) -> None:
    """It learned, the mechanism too, and what it saved is what it has."""
    before = learned(model)
    trainer.train()
    first, *_, last = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert last < first - 0.2
    after = learned(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    trainer.save_model(str(folder))
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config._attn_implementation == model.config._attn_implementation
    ids = torch.tensor([list(TEXTS[0].encode())])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


OPTIONS: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


@MECHANISMS
def test_trainer(config: Any, tmp_path: Path) -> None:
    model, tokenizer = variant(config), byte_tokenizer()
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_dict(dict(tokenizer(TEXTS))),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    check(trainer, model, tmp_path / "saved")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@MECHANISMS
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_trainer(config: Any, packing: bool, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model = variant(config)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path), max_length=64, packing=packing, bf16=False, **OPTIONS
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=byte_tokenizer(),
    )
    check(trainer, model, tmp_path / "saved")


TASK = """
task: same_again
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_by_the_documented_line(tmp_path: Path) -> None:
    """The harness gives the accuracy that the log-likelihoods of the choices give by hand."""
    model, tokenizer = variant(ExpressiveConfig(scale="learned", power=2.0)), byte_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"start": f"{word} and", "choices": [word, "nothing", "ox"], "answer": i % 3}
        for i, word in enumerate(["round", "over", "again", "up", "down", "left", "right"])
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "same_again.yaml").write_text(TASK.format(data=data))

    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    found = re.search(r'python -c "([^"]*cli_evaluate\(\))"', page)
    assert found is not None
    done = subprocess.run(
        [
            *(sys.executable, "-c", found[1], "--model", "hf", "--tasks", "same_again"),
            *("--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"),
            *("--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--batch_size", "2"),
            *("--output_path", str(tmp_path / "out.json")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("out*.json")
    result = json.loads(written.read_text())["results"]["same_again"]["acc,none"]

    def score(start: str, choice: str) -> float:
        context, whole = start.encode(), f"{start} {choice}".encode()
        ids = torch.tensor([list(whole)])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits[0].log_softmax(-1)
        places = range(len(context), len(whole))
        return sum(logits[place - 1, whole[place]].item() for place in places)

    right = 0
    for row in rows:
        scores = [score(row["start"], choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    assert result == pytest.approx(right / len(rows))
    assert 0 < right < len(rows)
