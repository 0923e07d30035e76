"""How attention is carried over from one model to another: transfer, distillation, ablation.

Both models run in this process. The teacher is the softmax checkpoint, its softmax evaluated through
hf_expressive (`kernel="rbf", p=2` is softmax attention), so that its attention modules see the same
masks in the same form as the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_expressive
from hf_expressive import ImplicitKernelConfig
from hf_expressive.attention.base import AttentionCall, Mechanism
from hf_expressive.discovery import AttentionModule, attention_modules
from hf_expressive.ops.response import Response
from hf_expressive.registry import CHILD

Batch = Mapping[str, Tensor]
#: What is put in the place of a mechanism to see whether its model needs it.
Ablation = Literal["uniform", "zero"]
ABLATIONS: tuple[Ablation, ...] = ("uniform", "zero")


def as_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, frozen, its softmax attention evaluated through hf_expressive."""
    softmax = ImplicitKernelConfig(kernel="rbf", p=2.0, norm_dropout=0.0)
    return hf_expressive.attach(model, softmax).eval().requires_grad_(False)


def learning_modules(model: PreTrainedModel) -> list[AttentionModule]:
    """The attention modules of a variant that do not stay softmax as a whole."""
    return [
        found
        for found in attention_modules(model)
        if isinstance(child := found.module._modules.get(CHILD), Mechanism)
        and not child.softmax_layer
        and child.softmax_heads != child.num_heads
    ]


class Student(nn.Module):
    """A stage of training: a student in whatever way it learns.

    Dropout is off even in training, for what is learned is a function; a mechanism's noise is not.
    """

    student: nn.Module

    def train(self, mode: bool = True) -> Self:
        super().train(False)
        self.training = mode
        for module in self.student.modules():
            if isinstance(module, Mechanism):
                module.train(mode)
        return self


class AttentionTransfer(Student):
    """Stage 1: every attention module of the student on the input that its counterpart gets.

        error of a layer = Σ_t |student_t − teacher_t|² / Σ_t |teacher_t|²

    over the tokens t that are no padding. One pass of the teacher serves all layers, and no layer's
    error depends on another layer of the student.

    Args:
        student: the variant. Only parameters inside its attention modules may be trained.
        teacher: see `as_teacher`; it is no part of this module, whose state is the student's alone.
        inputs: picks the models' arguments from a batch.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        inputs: Callable[[Batch], Mapping[str, Any]],
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self.inputs = inputs
        self.names = [found.name for found in attention_modules(student)]

    def forward(self, batch: Batch) -> Tensor:
        """|student − teacher|² and |teacher|² of each text and module, (batch, 2, modules)."""
        (teacher,) = self._teacher
        calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]] = {
            name: [] for name in self.names
        }

        def record(name: str, _: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            calls[name].append((args, kwargs, first(result)))

        handles = [
            teacher.get_submodule(name).register_forward_hook(
                partial(record, name), with_kwargs=True
            )
            for name in self.names
        ]
        try:
            with torch.no_grad():
                teacher(**self.inputs(batch))
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([self._compare(name, calls[name], batch) for name in self.names], dim=2)

    def _compare(self, name: str, calls: list[Any], batch: Batch) -> Tensor:
        if not calls:
            raise ValueError(
                f"these inputs do not reach {name}, so there is nothing to learn from."
            )
        module = self.student.get_submodule(name)
        rows = len(next(iter(batch.values())))
        sums = []
        for args, kwargs, target in calls:
            out = first(module(*args, **kwargs))
            mask = batch.get("attention_mask")
            counts = (
                mask[..., None].to(torch.float32)
                if mask is not None and mask.shape == target.shape[:2]
                else torch.ones((), device=target.device)
            )
            squares = [(out.float() - target.float()).square(), target.float().square()]
            sums.append(torch.stack([(x * counts).reshape(rows, -1).sum(1) for x in squares], 1))
        return torch.stack(sums).sum(dim=0)


class Distillation(Student):
    """Stage 2: the loss of a task on the outputs of student and teacher.

    Args:
        student: the variant, or PEFT's wrapper around it.
        teacher: the softmax checkpoint; no part of this module. `None`: the task's loss alone.
        inputs: picks the models' arguments from a batch.
        loss: (output of the student, of the teacher or `None`, batch) → scalar.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: PreTrainedModel | None,
        inputs: Callable[[Batch], Mapping[str, Any]],
        loss: Callable[[Any, Any, Batch], Tensor],
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = teacher if teacher is None else (teacher,)
        self.inputs = inputs
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        target = None
        if self._teacher is not None:
            with torch.no_grad():
                target = self._teacher[0](**self.inputs(batch))
        return self.loss(self.student(**self.inputs(batch)), target, batch)


def first(result: Any) -> Tensor:
    """The hidden states among what an attention module returns."""
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def ablated(model: nn.Module, how: Ablation) -> Iterator[None]:
    """Replaces every mechanism of a model, but not the softmax parts of a hybrid.

    `"uniform"`: all visible keys get the same weight, so a head says the mean of their values whatever
    the query is. `"zero"`: the heads say nothing.
    """

    def uniform(call: AttentionCall, heads: slice) -> tuple[Tensor, Tensor | None]:
        return call.attend(Response("square", epsilon=1.0), 0.0)

    def zero(call: AttentionCall, heads: slice) -> tuple[Tensor, Tensor | None]:
        out, weights = uniform(call, heads)
        return torch.zeros_like(out), weights

    found = [module for module in model.modules() if isinstance(module, Mechanism)]
    try:
        for module in found:
            # The instance's own attribute stands before the method of its class.
            module.__dict__["evaluate"] = {"uniform": uniform, "zero": zero}[how]
        yield
    finally:
        for module in found:
            module.__dict__.pop("evaluate", None)


def mean_error(accelerator: Accelerator, sums: Tensor) -> Tensor:
    """The loss of stage 1: the mean over attention modules of their errors on a batch.

    The batch is that of all processes, so that their number does not change the result.
    """
    difference, size = sums.sum(dim=0)
    return (difference / accelerator.reduce(size.detach(), reduction="mean")).mean()


@torch.no_grad()
def layer_errors(
    accelerator: Accelerator, transfer: AttentionTransfer, batches: Iterable[Batch]
) -> list[float]:
    """Error of each attention module of the student in evaluation, over all batches together."""
    transfer.eval()
    # Gathered by text: processes fill up the last batch with texts that have been there already.
    parts = [accelerator.gather_for_metrics(transfer(batch)) for batch in batches]
    difference, size = torch.cat(parts).sum(dim=0)
    return (difference / size).tolist()
