"""One conversion from the checkpoint to the measured model, stage by stage, and how it goes on.

A run keeps what it has measured in `progress.json`, the model after stage 1 in `transferred/`, and
within a stage the checkpoints of the training loop. Started again it takes up the latest of these.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import Attention
from loop import Checkpoints, Loop, TrainingOptions, adamw
from reporting import Run, write_text
from text import ShuffledBatches
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hf_expressive
from hf_expressive.registry import CHILD

from .objectives import Objective
from .options import ConversionOptions, TransferOptions, TuningOptions
from .report import LOSSLESS
from .transfer import (
    ABLATIONS,
    AttentionTransfer,
    Batch,
    Distillation,
    ablated,
    layer_errors,
    learning_modules,
    mean_error,
)


@dataclass(frozen=True)
class Conversion:
    """What all runs share.

    Attributes:
        original: outputs of the checkpoint on the validation split.
        base: its score.
        teacher: see `transfer.as_teacher`.
        validation: batches of the validation split, prepared.
        folder: of the results.
    """

    accelerator: Accelerator
    objective: Objective
    options: ConversionOptions
    transfer: TransferOptions
    tuning: TuningOptions
    original: Mapping[str, Tensor]
    base: Mapping[str, float]
    teacher: PreTrainedModel
    validation: Any
    folder: Path

    def score(self, model: nn.Module) -> dict[str, float]:
        outputs = self.objective.evaluate(self.accelerator, model, self.validation)
        return self.objective.score(outputs, self.original)

    def errors(self, student: PreTrainedModel) -> list[float]:
        """Error of each attention layer on the validation split."""
        module = AttentionTransfer(student, self.teacher, self.objective.inputs)
        return layer_errors(self.accelerator, module, self.validation)


class Notes:
    """What a run has measured so far, in a file that every process reads and the first one writes."""

    def __init__(self, accelerator: Accelerator, path: Path) -> None:
        self.accelerator, self.path = accelerator, path
        self.content: dict[str, Any] = {}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        accelerator.wait_for_everyone()

    def write(self, **values: Any) -> None:
        self.content |= values
        if self.accelerator.is_main_process:
            write_text(self.path, json.dumps(self.content, indent=2, ensure_ascii=False) + "\n")
        self.accelerator.wait_for_everyone()


def convert(task: Conversion, attention: Attention, seed: int) -> Run:
    """One conversion, or the rest of one that was stopped, or the report of a finished one.

    Raises:
        RuntimeError: the finished model is another when it is loaded again.
        Stopped: a signal came; the state is saved.
    """
    accelerator = task.accelerator
    where = task.folder / f"{attention.file_name}-seed{seed}"
    notes = Notes(accelerator, where / "progress.json")
    if "run" in notes.content:
        return Run(**notes.content["run"])
    title = f"{attention.text} seed {seed}"

    def load(path: str | Path) -> PreTrainedModel:
        set_seed(seed)  # what is new in the variant follows from it, whenever it is loaded
        auto_class = task.objective.auto_class
        model = attention.load(auto_class.from_pretrained, str(path), dtype=torch.float32)
        return model.to(accelerator.device)

    def save(model: PreTrainedModel, path: Path) -> None:
        model.save_pretrained(path, is_main_process=accelerator.is_main_process)
        accelerator.wait_for_everyone()

    transferred = where / "transferred"
    if "tuned" not in notes.content:
        student = load(transferred if "transferred" in notes.content else task.options.checkpoint)
        if "swapped" not in notes.content:
            notes.write(swapped={**task.score(student), "errors": task.errors(student)})
        lossless = max(notes.content["swapped"]["errors"]) < LOSSLESS
        if "transferred" not in notes.content:
            seconds = 0.0 if lossless else transfer(task, student, seed, where, title)
            measured = {**task.score(student), "errors": task.errors(student)}
            save(student, transferred)
            notes.write(transferred=measured, transfer_seconds=seconds)
        curve: Mapping[str, Any] = {}
        if task.tuning.tuning_steps and not lossless:
            student, loop = tune(task, student, seed, where, title)
            notes.write(tuning_seconds=loop.seconds)
            curve = dict(loop.curve)
        # Merged updates are other numbers than updates beside the weights, by their rounding.
        tuned = task.score(student)
        save(student, where)
        if accelerator.is_main_process:
            task.objective.tokenizer.save_pretrained(where)
        notes.write(tuned=tuned, curve=curve)

    # What is reported is what a user gets who loads the folder.
    student = load(where)
    again, before = task.score(student), notes.content["tuned"]
    if again != before:
        raise RuntimeError(
            f"{where} had {before} when it was saved, but {again} when loaded again."
        )
    bypassed: dict[str, dict[str, Any]] = {}
    for how in ABLATIONS:
        with ablated(student, how):
            bypassed[how] = task.score(student)
            if how == "uniform":
                bypassed[how]["errors"] = task.errors(student)
    run = report(task, attention, seed, notes.content, bypassed, student, where.name)
    notes.write(run=asdict(run))
    if accelerator.is_main_process:
        for done in (transferred, *where.glob("checkpoints-*")):
            shutil.rmtree(done, ignore_errors=True)
    accelerator.wait_for_everyone()
    return run


def transfer(
    task: Conversion, student: PreTrainedModel, seed: int, where: Path, title: str
) -> float:
    """Stage 1, in place; seconds spent."""
    student.requires_grad_(False)
    modules = [found.module for found in learning_modules(student)]
    parts = modules if task.transfer.transfer == "attention" else [m.mechanism for m in modules]
    for part in parts:
        part.requires_grad_(True)
    learns = any(parameter.requires_grad for parameter in student.parameters())
    options = task.transfer
    if not (learns and options.transfer_steps):
        return 0.0
    loop = train(
        task,
        AttentionTransfer(student, task.teacher, task.objective.inputs),
        task.options.stage(
            options.transfer_steps, options.transfer_learning_rate, options.transfer_warmup_steps
        ),
        lambda prepared, batch: mean_error(task.accelerator, prepared(batch)),
        lambda _: {"error": statistics.fmean(task.errors(student))},
        seed=2 * seed,
        folder=where / "checkpoints-transfer",
        title=f"{title} stage 1",
    )
    return loop.seconds


def tune(
    task: Conversion, student: PreTrainedModel, seed: int, where: Path, title: str
) -> tuple[PreTrainedModel, Loop]:
    """Stage 2: the tuned model, low-rank updates merged, and the loop that has run."""
    student.requires_grad_(True)
    set_seed(seed)  # of the low-rank updates, whatever has been drawn before
    options = task.tuning
    tuned: Any = student
    if options.tuning == "lora":
        tuned = peft.get_peft_model(student, lora_config(student, options.lora_rank))
    teacher = task.teacher if options.distillation else None
    loop = train(
        task,
        Distillation(tuned, teacher, task.objective.inputs, task.objective.loss),
        task.options.stage(
            options.tuning_steps, options.tuning_learning_rate, options.tuning_warmup_steps
        ),
        lambda prepared, batch: prepared(batch),
        lambda _: task.score(tuned),
        seed=2 * seed + 1,
        folder=where / "checkpoints-tuning",
        title=f"{title} stage 2",
    )
    return (tuned.merge_and_unload() if options.tuning == "lora" else student), loop


def train(
    task: Conversion,
    module: nn.Module,
    training: TrainingOptions,
    loss: Callable[[nn.Module, Batch], Tensor],
    measure: Callable[[nn.Module], dict[str, float]],
    *,
    seed: int,
    folder: Path,
    title: str,
) -> Loop:
    """Trains a module in place, from the checkpoint in `folder` where there is one."""
    accelerator, rows = task.accelerator, task.objective.splits["train"]
    parts = training.gradient_accumulation_steps
    micro = training.batch_size // parts
    order = ShuffledBatches(rows, micro, seed, training.steps * parts)
    optimizer, schedule = adamw(accelerator, module, training)
    prepared, optimizer, batches = accelerator.prepare(
        module,
        optimizer,
        DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=order,
            collate_fn=task.objective.collate,
            # Its own, so that making a loader draws nothing from the generator of a mechanism's noise.
            generator=torch.Generator(),
        ),
    )
    checkpoints = Checkpoints(accelerator, folder, task.options.checkpoint_every, keep=1)
    loop = Loop(
        accelerator,
        prepared,
        optimizer,
        schedule,
        loss=loss,
        measure=measure,
        training=training,
        title=title,
        samples=len(rows),
        checkpoints=checkpoints,
    )
    checkpoints.load()
    order.seek({"row": loop.step * training.batch_size})
    loop.run(batches)
    accelerator.free_memory(prepared, optimizer, batches)
    # Else the next stage's checkpoints would hold this stage's loop too.
    accelerator._custom_objects.clear()
    return loop


def lora_config(student: PreTrainedModel, rank: int) -> peft.LoraConfig:
    """Low-rank updates of every linear layer but the head's and a mechanism's, which learn whole."""
    head = student.get_output_embeddings()
    linear = {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and f".{CHILD}." not in name
    }
    return peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(linear),
        modules_to_save=hf_expressive.modules_to_save(student) or None,
        # GPT-2 keeps its weights the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )


def report(
    task: Conversion,
    attention: Attention,
    seed: int,
    notes: Mapping[str, Any],
    bypassed: Mapping[str, Mapping[str, Any]],
    student: PreTrainedModel,
    folder: str,
) -> Run:
    """The run in the terms of `reporting.Record`.

    `final` holds each quantity of the finished model under its own name, those of the other stages as
    `<quantity>_<stage>`, and the errors of the layers as `error_<stage>_<layer>`. The curve begins
    with the untouched variant; its second point is the one after stage 1.
    """
    stages: dict[str, Mapping[str, Any]] = {
        "base": task.base,
        "swapped": notes["swapped"],
        "transferred": notes["transferred"],
        **bypassed,
    }
    final = dict(notes["tuned"])
    for stage, values in stages.items():
        final |= {f"{name}_{stage}": value for name, value in values.items() if name != "errors"}
        errors = enumerate(values.get("errors", ()))
        final |= {f"error_{stage}_{layer}": error for layer, error in errors}
    key, steps = task.objective.metric_key, task.transfer.transfer_steps
    tuning = notes["curve"]
    return Run(
        variant=attention.text,
        attention=attention.section,
        seed=seed,
        parameters=student.num_parameters(),
        seconds=notes["transfer_seconds"] + notes.get("tuning_seconds", 0.0),
        curve={
            "step": [0, *(steps + step for step in tuning.get("step", (0,)))],
            key: [notes["swapped"][key], *tuning.get(key, (notes["transferred"][key],))],
        },
        final=final,
        folder=folder,
    )
