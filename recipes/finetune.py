"""Fine-tuning of a variant or of any base: LoRA or all weights, for text or for classes.

    accelerate launch recipes/finetune.py --checkpoint outputs/pretrain/model --train_files 'notes/*.md'
    accelerate launch recipes/finetune.py --checkpoint Qwen/Qwen3-0.6B --attention expressive:scale=1 \\
        --dataset roneneldan/TinyStories --length 512 --method full
    accelerate launch recipes/finetune.py --task classification --checkpoint outputs/convert/model \\
        --train_file reviews.csv --quantize bnb4

A checkpoint that is a variant stays one; --attention puts a mechanism onto a base. With LoRA the
mechanism's own parameters are trained in full and saved in the adapter, which loads onto a base with
the same mechanism and options alone (recipes/adapters.py). --merge saves a whole model instead.

The output folder gets settings.json, results.json with the curve, its picture, and adapter/ or model/.
A run that was stopped goes on with --resume.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from adapters import add_adapter, save_adapter
from arguments import ATTENTION_HELP, Attention, option, parse, require, require_at_least
from classify import Classification, ColumnOptions
from classify import ModelOptions as ClassifierOptions
from datasets import DatasetDict
from loop import Batch, Checkpoints, Loop, adamw, save_trained, start
from loop import TrainingOptions as LoopOptions
from pretrain import DataPosition, RunOptions, mean_loss
from pretrain import measure as measure_text
from reporting import Record, Run, plot, print_table
from resumable import begin, stoppable
from rich.console import Console
from supervised import DataOptions
from text import ShuffledBatches, Text, TextOptions
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_expressive.config import SECTION

_PACKAGES = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "torchao8": "torchao"}


@dataclass
class FineTuneOptions:
    _argument_group_name: ClassVar[str] = "what is tuned"

    checkpoint: str = option("", "model of the Hub, or folder: a variant, or any base")
    task: Literal["text", "classification"] = option(
        "text", "text: predict the next token; classification: tell the class of a text"
    )
    attention: str | None = option(
        None, ATTENTION_HELP.replace("what to compare", "without it the checkpoint's own; else")
    )
    method: Literal["lora", "full"] = option("lora", "train an adapter, or all weights")
    lora_rank: int = option(16, "rank of the updates")
    lora_alpha: int = option(32, "their scale, times the rank")
    lora_dropout: float = option(0.0, "dropout before them")
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "layers that get an update"}
    )
    merge: bool = option(False, "save the whole model with the updates merged, not an adapter")
    quantize: Literal["no", "bnb4", "bnb8", "torchao8"] = option(
        "no", "keep the base's weights in 4 or 8 bits, by bitsandbytes or torchao; LoRA only"
    )

    def __post_init__(self) -> None:
        require(bool(self.checkpoint), "--checkpoint is needed: what to start from.")
        require_at_least(self, 1, "lora_rank", "lora_alpha")
        if self.attention is not None:
            Attention.parse(self.attention)
        require(
            self.quantize == "no" or self.method == "lora",
            f"--quantize {self.quantize} keeps weights that cannot be trained; take --method lora.",
        )
        require(
            self.quantize == "no" or not self.merge,
            "--merge needs a base in full precision; leave out --quantize.",
        )
        package = _PACKAGES.get(self.quantize)
        require(
            package is None or importlib.util.find_spec(package) is not None,
            f"--quantize {self.quantize} needs the package {package}: pip install {package}.",
        )


@dataclass
class TrainingOptions(LoopOptions):
    seed: int = option(0, "of new weights and order")
    steps: int = option(500, "optimiser steps")
    batch_size: int = option(16, "rows or texts in a step, over all processes")
    learning_rate: float = option(2e-4, "of AdamW, at its highest; for --method full take 2e-5")
    schedule: str = option("cosine", "how the learning rate goes on after the warm-up, by its name")
    warmup_steps: int = option(20, "steps in which the learning rate rises from 0")
    evaluate_every: int = option(50, "steps between two measurements")


def load_options(options: FineTuneOptions) -> dict[str, Any]:
    """Keywords of `from_pretrained` for attention and quantised weights."""
    given: dict[str, Any] = {}
    if options.attention is not None:
        attention = Attention.parse(options.attention)
        given["attn_implementation"] = attention.implementation
        if attention.options is not None:
            given[SECTION] = attention.options
    if options.quantize in ("bnb4", "bnb8"):
        from transformers import BitsAndBytesConfig

        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=options.quantize == "bnb4",
            load_in_8bit=options.quantize == "bnb8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif options.quantize == "torchao8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        given["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    return given


class TextTask:
    """Rows of text, as in pretrain.py, with the checkpoint's tokenizer."""

    metric = ("loss", "validation loss (nats a token)")
    task_type = "CAUSAL_LM"

    def __init__(self, options: FineTuneOptions, text: TextOptions) -> None:
        text.tokenizer = text.tokenizer or options.checkpoint
        self.options, self.text = options, Text(text)
        self.tokenizer, self.name = self.text.tokenizer, text.name

    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.options.checkpoint, **load_options(self.options)
        )

    def loaders(self, batch_size: int, seed: int, batches: int) -> tuple[Any, Any, Any]:
        order = self.text.order(batch_size, seed, batches)
        training = self.text.training_loader(order, batch_size)
        return order, training, self.text.validation_loader(batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return mean_loss(model, batch)

    def measure(self, accelerator: Accelerator, model: nn.Module, rows: Any) -> dict[str, float]:
        return measure_text(accelerator, model, rows)


class ClassTask:
    """Texts with one class each, as in classify.py."""

    metric = ("accuracy", "accuracy")
    task_type = "SEQ_CLS"

    def __init__(self, options: FineTuneOptions, data: DataOptions, columns: ColumnOptions) -> None:
        self.options = options
        self.task = Classification(data, columns, ClassifierOptions(checkpoint=options.checkpoint))
        self.tokenizer, self.name = self.task.tokenizer, data.name

    def model(self) -> PreTrainedModel:
        model = self.task.load(**load_options(self.options))
        if model.config.pad_token_id is None:  # decoders look for the end of a text by it
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def loaders(self, batch_size: int, seed: int, batches: int) -> tuple[Any, Any, Any]:
        splits: DatasetDict = self.task.splits
        order = ShuffledBatches(splits["train"], batch_size, seed, batches)
        common: dict[str, Any] = {"collate_fn": self.collate, "generator": torch.Generator()}
        training: DataLoader[Any] = DataLoader(order.rows, batch_sampler=order, **common)  # type: ignore[arg-type]
        return order, training, self.task.loader("validation", batch_size)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return self.task.collate(rows)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.losses(model, batch).mean()

    def measure(self, accelerator: Accelerator, model: nn.Module, rows: Any) -> dict[str, float]:
        return self.task.measure(accelerator, model, rows)


def finetune(
    accelerator: Accelerator,
    task: TextTask | ClassTask,
    options: FineTuneOptions,
    training: TrainingOptions,
    output: RunOptions,
    folder: Path,
) -> Run:
    """Trains, measures on the way, saves an adapter or a model."""
    set_seed(training.seed)
    model: Any = task.model()
    section = getattr(model.config, SECTION) or {"mechanism": model.config._attn_implementation}
    if options.quantize != "no":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if options.method == "lora":
        targets: Any = options.target_modules
        model = add_adapter(
            model,
            task_type=task.task_type,
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
        )
    optimizer, schedule = adamw(accelerator, model, training)
    parts = training.gradient_accumulation_steps
    micro = training.batch_size // parts
    order, batches, validation = task.loaders(micro, training.seed, training.steps * parts)
    model, optimizer, batches, validation = accelerator.prepare(
        model, optimizer, batches, validation
    )
    checkpoints = Checkpoints(
        accelerator, folder / "checkpoints", output.checkpoint_every, output.keep_checkpoints
    )
    title = options.attention or section["mechanism"]
    loop = Loop(
        accelerator,
        model,
        optimizer,
        schedule,
        loss=task.loss,
        measure=lambda module: task.measure(accelerator, module, validation),
        training=training,
        title=f"{title} {options.method}",
        samples=training.steps * training.batch_size,
        checkpoints=checkpoints,
    )
    accelerator.register_for_checkpointing(DataPosition(order, loop, training.batch_size))
    if output.resume:
        checkpoints.load()
    final = loop.run(batches)
    where = save(accelerator, model, task, options, folder)
    return Run(
        variant=f"{title} {options.method}",
        attention=section,
        seed=training.seed,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=loop.seconds,
        curve=dict(loop.curve),
        final=final,
        folder=where.name,
    )


def save(
    accelerator: Accelerator, model: nn.Module, task: Any, options: FineTuneOptions, folder: Path
) -> Path:
    """adapter/, or model/ with all weights."""
    if options.method == "full":
        save_trained(accelerator, model, folder / "model", task.tokenizer)
        return folder / "model"
    plain: Any = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    where = folder / ("model" if options.merge else "adapter")
    if accelerator.is_main_process:
        if options.merge:
            plain.load_state_dict(state)
            plain.merge_and_unload().save_pretrained(where)
        else:
            save_adapter(plain, where, state)
        task.tokenizer.save_pretrained(where)
    accelerator.wait_for_everyone()
    return where


def describe(task: TextTask | ClassTask, options: FineTuneOptions) -> dict[str, Any]:
    """The task in the terms of `reporting.Record`."""
    key, name = task.metric
    kind = "text-generation" if options.task == "text" else "text-classification"
    return {
        "type": kind,
        "name": f"{options.checkpoint} on {task.name}",
        "description": "Predict the next token." if options.task == "text" else "Tell the class.",
        "dataset": {"name": task.name, "type": task.name, "description": "See the settings."},
        "metric": {"type": key, "key": key, "name": name, "description": f"{name} at the end."},
    }


def main() -> None:
    # Options of the two tasks have names in common; the task decides which are read.
    is_class = any(
        after == "classification" for word, after in zip(sys.argv, sys.argv[1:], strict=False)
        if word == "--task"
    ) or "--task=classification" in sys.argv  # fmt: skip
    groups: list[Any] = [DataOptions, ColumnOptions] if is_class else [TextOptions]
    options, training, output, *data = parse(
        [FineTuneOptions, TrainingOptions, RunOptions, *groups], "finetune.py", __doc__
    )
    accelerator, folder = start("finetune", training, output)
    if options.quantize == "bnb4" and accelerator.device.type == "cpu":
        # At the first evaluation bitsandbytes packs them anew, for a product without a gradient.
        sys.exit(
            "error: gradients pass 4-bit weights on a GPU only; on a CPU take --quantize bnb8 or "
            "torchao8."
        )
    settings = {key: v for part in (options, training, *data) for key, v in asdict(part).items()}
    surroundings = begin("finetune", accelerator, folder, settings, output.resume)
    with stoppable(accelerator):
        with accelerator.main_process_first():
            task = ClassTask(options, *data) if is_class else TextTask(options, *data)
        run = finetune(accelerator, task, options, training, output, folder)
    record = Record(
        recipe="finetune",
        task=describe(task, options),
        settings=settings,
        runs=[run],
        environment=surroundings,
    )
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    if accelerator.is_main_process:
        record.save(folder / "results.json")
        plot(record, folder / f"{task.metric[0]}.png")
        print_table(record, console)
        Checkpoints(accelerator, folder / "checkpoints", 1).remove()
    console.print(f"{folder}: results.json and {run.folder}/ are written")
    accelerator.end_training()


if __name__ == "__main__":
    main()
