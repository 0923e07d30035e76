"""The training loop of every recipe: options, parameter groups, steps, measurements, checkpoints.

A recipe brings a model, batches, a loss and a measurement. The loop brings gradient accumulation and
clipping, the learning rate's schedule, progress, trackers, the curve, and, where it is given a folder
for them, checkpoints from which a run that was stopped at any step goes on as if it had not been.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.utils import LoggerType
from arguments import option, require, require_at_least
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, get_scheduler
from transformers.utils.logging import disable_progress_bar

from hf_expressive import auxiliary_loss

Batch = Mapping[str, Tensor]

#: Exit status of a run that a signal stopped, by the shell's convention 128 + SIGTERM.
STOPPED = 128 + signal.SIGTERM


@dataclass
class TrainingOptions:
    """Steps, batches, optimiser; a recipe sets its own defaults."""

    _argument_group_name: ClassVar[str] = "training"

    steps: int = option(2000, "optimiser steps of a run")
    batch_size: int = option(64, "samples in a step, over all processes and accumulated batches")
    gradient_accumulation_steps: int = option(1, "batches that a step is put together from")
    learning_rate: float = option(5e-4, "of AdamW, at its highest")
    schedule: Literal["constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = option(
        "linear", "how the learning rate goes on after the warm-up"
    )
    warmup_steps: int = option(100, "steps in which the learning rate rises from 0")
    weight_decay: float = option(
        0.01, "of weight matrices; biases, norms and what a mechanism learns go without"
    )
    max_grad_norm: float = option(
        1.0, "longer gradients are shortened to this length; 0 leaves them"
    )
    evaluate_every: int = option(200, "steps between two measurements")

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "steps", "batch_size", "gradient_accumulation_steps", "evaluate_every"
        )
        require_at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm")
        require(
            self.learning_rate > 0, f"--learning_rate must be positive, got {self.learning_rate}."
        )


@dataclass
class OutputOptions:
    _argument_group_name: ClassVar[str] = "output"

    output_dir: str | None = option(None, "folder for results; without it outputs/<recipe>")
    overwrite: bool = option(False, "replace the results that the output folder already holds")
    report_to: str = option("none", "tracker of Accelerate (tensorboard, wandb, …), all, or none")

    def __post_init__(self) -> None:
        known = ["none", *(kind.value for kind in LoggerType)]
        require(
            self.report_to in known,
            f"--report_to must be one of {', '.join(known)}; got {self.report_to!r}.",
        )


def start(
    name: str, training: TrainingOptions, output: OutputOptions, results: str = "results.json"
) -> tuple[Accelerator, Path]:
    """The accelerator and the output folder; ends the program if results would be lost."""
    disable_progress_bar()  # Transformers' bars for files of a few kilobytes
    folder = Path(output.output_dir or f"outputs/{name}")
    if (folder / results).exists() and not output.overwrite:
        sys.exit(
            f"error: {folder / results} exists; choose another --output_dir, or pass --overwrite."
        )
    accelerator = Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        # A batch is divided among the processes, so that their number does not change the result.
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
        log_with=None if output.report_to == "none" else output.report_to,
        project_dir=folder,
    )
    parts = accelerator.num_processes * training.gradient_accumulation_steps
    if training.batch_size % parts:
        sys.exit(
            f"error: --batch_size must be a multiple of {parts}, processes × accumulated batches; "
            f"got {training.batch_size}."
        )
    return accelerator, folder


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices with decay, everything else that is trained without.

    Frequencies, noise and exponents of a mechanism have no neutral zero to decay to.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() >= 2 and ".mechanism." not in name
            (decayed if is_matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def adamw(
    accelerator: Accelerator, model: nn.Module, training: TrainingOptions, **options: Any
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its schedule, for a model that is not prepared yet."""
    groups = parameter_groups(model, training.weight_decay)
    # One kernel for all parameters instead of a dozen for each.
    options["fused"] = accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, **options)
    schedule = get_scheduler(
        training.schedule, optimizer, training.warmup_steps, num_training_steps=training.steps
    )
    return optimizer, schedule


def save_trained(
    accelerator: Accelerator,
    model: nn.Module,
    where: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Saves a prepared model, whole, with its tokenizer; returns its number of parameters."""
    plain: Any = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    plain.save_pretrained(where, is_main_process=accelerator.is_main_process, state_dict=state)
    if tokenizer is not None and accelerator.is_main_process:
        tokenizer.save_pretrained(where)
    return plain.num_parameters()


class Checkpoints:
    """Complete states of a run in `folder`/step-<number>, the newest `keep` of them.

    A state is written under another name and renamed when every process has written its part, so
    that a folder with this name is whole, whenever the run was killed.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, every: int, keep: int = 2) -> None:
        self.accelerator, self.folder, self.every, self.keep = accelerator, folder, every, keep

    def steps(self) -> list[int]:
        """Steps with a checkpoint, in order."""
        names = (path.name for path in self.folder.glob("step-*"))
        return sorted(int(name.removeprefix("step-")) for name in names)

    def save(self, step: int) -> None:
        accelerator, whole = self.accelerator, self.folder / f"step-{step}"
        partial = self.folder / f"partial-{step}"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(whole, ignore_errors=True)
            partial.rename(whole)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old}")
        accelerator.wait_for_everyone()

    def remove(self) -> None:
        """Deletes them all, when the run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def load(self) -> int | None:
        """Brings everything that was prepared or registered back to the newest checkpoint.

        Returns:
            Its step; `None` where there is no checkpoint.
        """
        if not (steps := self.steps()):
            return None
        self.accelerator.load_state(str(self.folder / f"step-{steps[-1]}"))
        return steps[-1]


class Stopped(Exception):
    """A signal stopped the run after its state was saved."""


class Loop:
    """Trains a prepared model; a thing to register for checkpointing.

    Args:
        accelerator: with `gradient_accumulation_steps` set.
        model, optimizer: prepared by the accelerator.
        schedule: the learning rate's; steps with the optimiser, not prepared.
        loss: (model, batch) → the mean loss of a batch, to be minimised.
        measure: (model) → quantities of the validation data, alike on every process; the model is in
            evaluation mode and no gradient is kept.
        training: the options.
        title: names the run in progress bar and trackers.
        samples: size of the training data; divides the regulariser of a mechanism that has one, which
            belongs to the data as a whole.
        tokens: tokens of a step over all processes, for the rate.
        utilisation: model FLOPs of a token over what all devices can do in a second.
        checkpoints: where to save states; without it nothing is saved and signals end the program.
        log_every: steps between two looks at the training loss, each of which waits for the device.
        noted: called after every measurement, with its result in the curve.

    Attributes:
        step: optimiser steps done.
        curve: step and measured quantities, with `train_loss` and, where `tokens` is given,
            `tokens_per_second` since the measurement before.
        seconds: time in training and measurement, over all parts of a resumed run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        *,
        loss: Callable[[nn.Module, Any], Tensor],
        measure: Callable[[nn.Module], dict[str, float]],
        training: TrainingOptions,
        title: str,
        samples: int,
        tokens: int | None = None,
        utilisation: float | None = None,
        checkpoints: Checkpoints | None = None,
        log_every: int = 10,
        noted: Callable[[Loop], None] = lambda loop: None,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.schedule, self.loss, self.measure = schedule, loss, measure
        self.training, self.title, self.samples, self.tokens = training, title, samples, tokens
        self.utilisation = utilisation
        self.checkpoints, self.log_every, self.noted = checkpoints, log_every, noted
        self.step = 0
        self.curve: dict[str, list[float | None]] = defaultdict(list)
        self.seconds = self.training_seconds = 0.0
        self._losses: list[float] = []
        self._noted = (0, 0.0)
        self._shown: dict[str, str] = {}
        if checkpoints is not None:
            accelerator.register_for_checkpointing(self, schedule)

    # What a checkpoint holds of the loop itself.
    _STATE = ("step", "curve", "seconds", "training_seconds", "_losses", "_noted")

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self._STATE}
        return {**state, "curve": dict(self.curve)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state[name])
        self.curve = defaultdict(list, self.curve)

    @property
    def final(self) -> dict[str, float]:
        """The last value of each quantity."""
        return {key: values[-1] for key, values in self.curve.items() if key != "step"}

    def run(self, batches: Iterable[Any]) -> dict[str, float]:
        """Trains until the last step and returns `final`.

        Args:
            batches: this process's, from the batch after `step` on.

        Raises:
            Stopped: SIGTERM or SIGUSR1 came, and the state is saved.
            FloatingPointError: the loss is not a finite number any more.
        """
        self._bar = tqdm(
            total=self.training.steps,
            initial=self.step,
            desc=self.title,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not self.accelerator.is_main_process,
        )
        try:
            with self._bar, _Signals(self.checkpoints is not None) as signals:
                self._run(batches, signals)
        finally:
            # A loader that is left with batches to go would go on to count as the one in use, and
            # what is gathered next would be cut to the size of its last batch.
            if isinstance(batches, DataLoaderStateMixin):
                batches.end()
        return self.final

    def _run(self, batches: Iterable[Any], signals: _Signals) -> None:
        accelerator, training = self.accelerator, self.training
        clock = _Clock(self)
        if self.step == 0:
            self._note(clock)
        self.model.train()
        # Summed at once: a compiled model may write the next loss where this one lies.
        summed, count = torch.zeros((), device=accelerator.device), 0
        for batch in _without_a_trace(batches):
            with accelerator.accumulate(self.model):
                loss = self.loss(self.model, batch)
                accelerator.backward(loss + auxiliary_loss(self.model) / self.samples)
                if accelerator.sync_gradients and training.max_grad_norm:
                    accelerator.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            summed, count = summed + loss.detach(), count + 1
            if not accelerator.sync_gradients:
                continue
            self.schedule.step()
            self.step += 1
            last = self.step == training.steps
            look = self.step % self.log_every == 0 or self.step % training.evaluate_every == 0
            stop = False
            if look or last or self._is_due():
                self._look(summed / count, count)
                summed, count = torch.zeros_like(summed), 0
                clock.read()
                if signals.received:
                    accelerator.set_trigger()
                stop = self.checkpoints is not None and accelerator.check_trigger() and not last
            self._bar.update()
            if self.step % training.evaluate_every == 0 or last:
                self._note(clock)
            if self.checkpoints is not None and (self._is_due() or stop):
                self.checkpoints.save(self.step)
                clock.skip()
            if last:  # a stream would go on
                return
            if stop:
                raise Stopped(f"stopped by a signal after step {self.step}; its state is saved.")
        if self.step != training.steps:
            raise ValueError(f"the data ended after step {self.step} of {training.steps}.")

    def _is_due(self) -> bool:
        return self.checkpoints is not None and self.step % self.checkpoints.every == 0

    def _look(self, mean: Tensor, batches: int) -> None:
        """Takes the mean training loss of the batches since the last look, over all processes."""
        value = self.accelerator.reduce(mean, reduction="mean").item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.title}: the training loss is {value} at step {self.step}; lower "
                "--learning_rate or --max_grad_norm."
            )
        self._losses += [value] * batches
        self._bar.set_postfix({"loss": f"{value:.4f}", **self._shown}, refresh=False)

    def _note(self, clock: _Clock) -> None:
        """Measures, and enters the result into curve and trackers."""
        clock.read()
        self.model.eval()
        with torch.no_grad():
            values = self.measure(self.model)
        self.model.train()
        self._shown = {
            "validation" if key == "loss" else key: f"{value:.4f}" for key, value in values.items()
        }
        step, seconds = self._noted
        if self._losses:
            values["train_loss"] = sum(self._losses) / len(self._losses)
        if self.tokens is not None and self.step > step:
            elapsed = self.training_seconds - seconds
            rate = values["tokens_per_second"] = (self.step - step) * self.tokens / elapsed
            if self.utilisation is not None:
                values["mfu"] = rate * self.utilisation
        self._losses = []
        self._noted = (self.step, self.training_seconds)
        for key, value in {"step": self.step, **values}.items():
            # Known from the second measurement on; curves are of one length.
            column = self.curve[key]
            column += [None] * (len(self.curve["step"]) - len(column) - (key != "step"))
            column.append(value)
        logged = {f"{self.title}/{key}": value for key, value in values.items()}
        self.accelerator.log(logged, step=self.step)
        self._bar.set_postfix(self._shown)
        self.noted(self)
        clock.skip(measured=True)


def _without_a_trace(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, the random numbers after the first one as they were before it.

    A loader draws one when it starts, which a resumed run does once more.
    """
    state: Tensor | None = torch.get_rng_state()
    for batch in batches:
        if state is not None:
            torch.set_rng_state(state)
            state = None
        yield batch


class _Clock:
    """Adds the time since the last reading to a loop's seconds."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.last = time.perf_counter()

    def read(self) -> None:
        """Time in training; call it where the device has just been waited for."""
        elapsed = self._elapsed()
        self.loop.seconds += elapsed
        self.loop.training_seconds += elapsed

    def skip(self, measured: bool = False) -> None:
        """Time in something else: a measurement, which the run's seconds count, or not even that."""
        elapsed = self._elapsed()
        if measured:
            self.loop.seconds += elapsed

    def _elapsed(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


class _Signals:
    """Takes SIGTERM and SIGUSR1 (which Slurm sends before a job's end, if asked to) as a request."""

    _KINDS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, active: bool) -> None:
        self.active, self.received = active, False

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def __enter__(self) -> _Signals:
        if self.active:
            self.before = {kind: signal.signal(kind, self._receive) for kind in self._KINDS}
        return self

    def __exit__(self, *error: object) -> None:
        if self.active:
            for kind, handler in self.before.items():
                signal.signal(kind, handler)
