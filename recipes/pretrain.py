"""Pretraining of a causal language model with any kind of attention, on any number of processes.

    accelerate launch recipes/pretrain.py
    accelerate launch --mixed_precision bf16 recipes/pretrain.py --attention expressive:power=2 \\
        --train_files 'corpus/**/*.txt' --width 512 --layers 6 --heads 8 --steps 20000
    accelerate launch recipes/pretrain.py --dataset HuggingFaceFW/fineweb-edu --streaming \\
        --dataset_config sample-10BT --tokenizer openai-community/gpt2 --length 2048

Without options a small Llama learns the source code of Python's standard library byte by byte, in
some minutes on a processor and with nothing to download. Every mechanism and hybrid of hf_expressive is
an option: --attention expressive:softmax_layers=[0,2], for example.

A run that was stopped, by SIGTERM or SIGUSR1 after the step at hand or in any other way, goes on from
its newest checkpoint with the same command and --resume, and ends with the figures of a run that was
not. The output folder gets settings.json, results.json with the curve, loss.png, the model with its
tokenizer and a model card, and checkpoints/ while it runs.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from arguments import ATTENTION_HELP, Attention, option, parse, require, require_at_least
from loop import (
    Batch,
    Checkpoints,
    Loop,
    OutputOptions,
    TrainingOptions,
    adamw,
    save_trained,
    start,
)
from reporting import Record, Run, plot, print_table, write_text
from resumable import begin, stoppable
from rich.console import Console
from text import IGNORED, PackedStream, ShuffledBatches, Text, TextOptions
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_expressive.hub import render_card
from hf_expressive.registry import MECHANISMS

#: Dense bf16 rates of whole chips without sparsity, TFLOP/s, by a part of the device's name.
_PEAK_TFLOPS = {"H200": 989, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362}


@dataclass
class ModelOptions:
    _argument_group_name: ClassVar[str] = "the model"

    attention: str = option(
        "expressive", ATTENTION_HELP.replace("what to compare", "its attention")
    )
    config: str | None = option(
        None, "config.json, its folder, or a model of the Hub whose config to take; weights are new"
    )
    architecture: str = option(
        "llama",
        "without --config: model type of Transformers; llama: rotary positions; qwen3: the same with "
        "query/key normalisation; gpt2: learned positions",
    )
    width: int = option(256, "without --config: size of the hidden state")
    layers: int = option(4, "without --config: number of layers")
    heads: int = option(4, "without --config: attention heads in a layer; must divide --width")
    kv_heads: int = option(None, "without --config: key/value heads; without it as many as --heads")
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "other fields of the config, as name=value with JSON values"},
    )
    gradient_checkpointing: bool = option(False, "compute activations twice to save memory")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "width", "layers", "heads")
        if self.kv_heads is None:
            self.kv_heads = self.heads
        for name, whole in (("heads", self.width), ("kv_heads", self.heads)):
            part = getattr(self, name)
            require(whole % part == 0, f"--{name} must divide {whole}, got {part}.")
        require(
            self.architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            f"--architecture {self.architecture} has no causal language model in Transformers.",
        )
        Attention.parse(self.attention)
        self.overrides()

    def overrides(self) -> dict[str, Any]:
        found = {}
        for text in self.config_overrides:
            name, equals, value = text.partition("=")
            require(bool(equals), f"--config_overrides: expected name=value, got {text!r}.")
            try:
                found[name] = json.loads(value)
            except json.JSONDecodeError:
                found[name] = value
        return found


@dataclass
class PretrainOptions(TrainingOptions):
    seed: int = option(0, "of initial weights and order")
    steps: int = option(1000, "optimiser steps")
    batch_size: int = option(16, "rows in a step, over all processes and accumulated batches")
    learning_rate: float = option(1e-3, "of AdamW, at its highest")
    schedule: str = option("cosine", "how the learning rate goes on after the warm-up, by its name")
    weight_decay: float = option(
        0.1, "of weight matrices; biases, norms and what a mechanism learns go without"
    )
    adam_betas: list[float] = field(
        default_factory=lambda: [0.9, 0.95], metadata={"help": "AdamW's two decay rates"}
    )
    compile: Literal["no", "layers", "default", "reduce-overhead"] = option(
        "no",
        "torch.compile: layers, one layer, whose code then serves all of them; or the model as a "
        "whole in this mode, which takes minutes; needs --documents joined",
    )
    log_every: int = option(10, "steps between two looks at the loss, and at a waiting signal")
    peak_tflops: float | None = option(
        None, "rate of one device for the model FLOPs utilisation, where it is not a known GPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "log_every")
        require_at_least(self, 0, "seed")
        require(len(self.adam_betas) == 2, "--adam_betas takes two numbers.")


@dataclass
class RunOptions(OutputOptions):
    resume: bool = option(
        False, "go on from the newest checkpoint of --output_dir, if there is one"
    )
    checkpoint_every: int = option(500, "steps between two checkpoints")
    keep_checkpoints: int = option(2, "how many checkpoints to keep while it runs")
    save_model: bool = option(True, "save the model at the end; off for studies of many settings")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "checkpoint_every", "keep_checkpoints")
        require(
            not (self.resume and self.overwrite), "--resume and --overwrite exclude each other."
        )


# ---- model ---------------------------------------------------------------------------------------


def model_config(options: ModelOptions, text: Text) -> PreTrainedConfig:
    """The config of --config, or a small one; vocabulary and length are the text's.

    Raises:
        ValueError: a field that this kind of config does not have.
    """
    tokenizer, length = text.tokenizer, text.options.length
    sizes: dict[str, Any] = {
        "vocab_size": max(len(tokenizer), tokenizer.vocab_size),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if options.config is not None:
        known = AutoConfig.from_pretrained(options.config)
    else:
        known = AutoConfig.for_model(options.architecture)
        sizes |= {
            "hidden_size": options.width,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "max_position_embeddings": length,
        }
        # Where an architecture has these. A gated feed-forward layer has three matrices: 8/3 times
        # the width, in multiples of 64, costs what 4 times does with two.
        gated = -(-8 * options.width // 3 // 64) * 64
        present = {
            "num_key_value_heads": options.kv_heads,
            "head_dim": options.width // options.heads,
            "intermediate_size": gated,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
        sizes |= {name: value for name, value in present.items() if hasattr(known, name)}
        sizes["tie_word_embeddings"] = True
    overrides = options.overrides()
    unknown = sorted(name for name in overrides if not hasattr(known, name))
    require(
        not unknown, f"--config_overrides: {known.model_type} has no field {', '.join(unknown)}."
    )
    # Made with them, not changed to them: other fields are derived from these.
    if options.config is not None:
        return AutoConfig.from_pretrained(options.config, **{**sizes, **overrides})
    return AutoConfig.for_model(options.architecture, **{**sizes, **overrides})


def compile_model(model: PreTrainedModel, how: str) -> None:
    """Compiles a model in place at its first pass.

    Args:
        how: `"no"`; `"layers"`, each by itself; or a mode of `torch.compile` for the whole.

    Raises:
        ValueError: an architecture whose layers Transformers does not mark as such.
    """
    if how == "layers":
        layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        require(
            bool(layers),
            f"--compile layers finds no layers in {model.config.model_type}; pass --compile default.",
        )
        for layer in layers:
            layer.compile()
    elif how != "no":
        model.compile(mode=how)


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Floating-point operations of forward and backward for one token.

        6 · (parameters that multiply) + 6 · layers · width of all heads · length

    Twice two operations backward for two forward; attention counts its two products for the half of
    the keys that a causal mask leaves, at the cost of softmax attention whatever the mechanism is.
    """
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    multiplied = sum(parameter.numel() for parameter in model.parameters())
    if output is None or output.weight is not embedding:  # a look-up multiplies nothing
        multiplied -= embedding.numel()
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * multiplied + 6.0 * config.num_hidden_layers * heads * dim * length


def peak_flops(accelerator: Accelerator, given: float | None) -> float | None:
    """Operations a second of all devices at their best; `None` where it is not known."""
    if given is None and accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
        given = next((rate for part, rate in _PEAK_TFLOPS.items() if part in name), None)
    return None if given is None else given * 1e12 * accelerator.num_processes


# ---- loss and measurement ------------------------------------------------------------------------


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed and divided by the places of a batch, (rows · (length − 1)).

    So every token weighs the same, however the batch is divided among processes, and whatever the
    number of document ends in it.
    """
    rows, length = batch["input_ids"].shape
    return model(**batch, use_cache=False, num_items_in_batch=rows * (length - 1)).loss


def measure(
    accelerator: Accelerator, model: nn.Module, validation: Iterable[Batch]
) -> dict[str, float]:
    """`loss` in nats a token and `perplexity` of the validation rows, alike on every process."""
    sums, counts = [], []
    for batch in validation:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        losses = cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        total, count = accelerator.gather_for_metrics(
            (losses.sum(dim=1), (labels != IGNORED).sum(dim=1))
        )
        sums.append(total)
        counts.append(count)
    loss = (torch.cat(sums).double().sum() / torch.cat(counts).sum()).item()
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


# ---- the run -------------------------------------------------------------------------------------


class DataPosition:
    """Where the run stands in its data; a thing to register for checkpointing."""

    def __init__(self, order: ShuffledBatches | PackedStream, loop: Loop, batch_size: int) -> None:
        self.order, self.loop, self.batch_size = order, loop, batch_size

    def state_dict(self) -> dict[str, Any]:
        return self.order.state(self.loop.step * self.batch_size)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order.seek(state)


def pretrain(
    accelerator: Accelerator,
    text: Text,
    model_options: ModelOptions,
    training: PretrainOptions,
    output: RunOptions,
    folder: Path,
) -> Run:
    """Trains, measures on the way, saves the model.

    Raises:
        Stopped: a signal came.
    """
    set_seed(training.seed)
    attention = Attention.parse(model_options.attention)
    # Billions of random numbers are drawn faster where the model is going to be; one that is divided
    # among devices may not fit there as a whole.
    divided = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    with torch.device("cpu") if divided else accelerator.device:
        model: Any = attention.causal_lm(model_config(model_options, text))
    if model_options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters, flops = model.num_parameters(), flops_per_token(model, text.options.length)
    compile_model(model, training.compile)
    parts = training.gradient_accumulation_steps
    micro = training.batch_size // parts
    order = text.order(micro, training.seed, training.steps * parts)
    optimizer, schedule = adamw(
        accelerator, model, training, betas=(training.adam_betas[0], training.adam_betas[1])
    )
    model, optimizer, batches, validation = accelerator.prepare(
        model, optimizer, text.training_loader(order, micro), text.validation_loader(micro)
    )
    tokens = training.batch_size * text.options.length
    peak = peak_flops(accelerator, training.peak_tflops)
    checkpoints = Checkpoints(
        accelerator, folder / "checkpoints", output.checkpoint_every, output.keep_checkpoints
    )
    loop = Loop(
        accelerator,
        model,
        optimizer,
        schedule,
        loss=mean_loss,
        measure=lambda module: measure(accelerator, module, validation),
        training=training,
        title=f"{attention.text} seed {training.seed}",
        samples=training.steps * training.batch_size,
        tokens=tokens,
        utilisation=None if peak is None else flops / peak,
        checkpoints=checkpoints,
        log_every=training.log_every,
        noted=lambda loop: write_curve(accelerator, loop, folder),
    )
    accelerator.register_for_checkpointing(DataPosition(order, loop, training.batch_size))
    if output.resume:
        checkpoints.load()
    final = loop.run(batches)

    where = folder / "model"
    if output.save_model:
        save_trained(accelerator, model, where, text.tokenizer)
    return Run(
        variant=attention.text,
        attention=attention.section,
        seed=training.seed,
        parameters=parameters,
        seconds=loop.seconds,
        curve=dict(loop.curve),
        final=final,
        folder=where.name if output.save_model else None,
    )


def write_curve(accelerator: Accelerator, loop: Loop, folder: Path) -> None:
    """curve.json, what is known of a run that is under way."""
    if accelerator.is_main_process:
        write_text(folder / "curve.json", json.dumps(loop.curve) + "\n")


def describe(text: Text, training: PretrainOptions) -> dict[str, Any]:
    """The task in the terms of `reporting.Record`."""
    unit = "byte" if text.is_bytes else "token"
    shared = "separate" if text.options.documents == "separate" else "joined"
    return {
        "type": "text-generation",
        "name": f"language model of {text.options.name}",
        "description": f"Predict the next {unit} of a text.",
        "dataset": {
            "name": text.options.name,
            "type": text.options.dataset or "local files",
            "split": text.options.validation_split or "documents set aside",
            "description": (
                f"Rows of {text.options.length} {unit}s, the documents in a row {shared}."
                + text.fingerprint()
            ),
        },
        "metric": {
            "type": "loss",
            "key": "loss",
            "name": f"validation loss (nats a {unit})",
            "description": (
                f"Cross-entropy in nats a {unit} on the validation rows, after the last training "
                "step."
            ),
        },
        "training": (
            f"AdamW, {training.schedule} schedule with {training.warmup_steps} steps of warm-up, "
            f"{training.steps} steps of {training.batch_size} rows."
        ),
        "limits": ["It continues text and was not made to follow instructions."],
    }


def main() -> None:
    text_options, model, training, output = parse(
        [TextOptions, ModelOptions, PretrainOptions, RunOptions], "pretrain.py", __doc__
    )
    if training.compile != "no" and text_options.documents != "joined":
        sys.exit(
            "error: --compile cannot tell documents in a row apart; pass --documents joined too."
        )
    accelerator, folder = start("pretrain", training, output)
    settings = {
        key: value
        for options in (text_options, model, training)
        for key, value in asdict(options).items()
    }
    if output.overwrite and accelerator.is_main_process:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    surroundings = begin("pretrain", accelerator, folder, settings, output.resume)
    with stoppable(accelerator):
        with accelerator.main_process_first():  # the others read what the first one has cached
            text = Text(text_options)
        run = pretrain(accelerator, text, model, training, output, folder)
    record = Record(
        recipe="pretrain",
        task=describe(text, training),
        settings=settings,
        runs=[run],
        environment=surroundings,
    )
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    if accelerator.is_main_process:
        record.save(folder / "results.json")
        plot(record, folder / "loss.png")
        print_table(record, console)
        if run.folder is not None:
            write_card(folder / run.folder, record)
        (folder / "curve.json").unlink()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    console.print(f"{folder}: results.json and loss.png are written")
    accelerator.end_training()


def write_card(where: Path, record: Record) -> None:
    """The model card of a variant, beside its weights."""
    (run,) = record.runs
    if run.attention["mechanism"] in MECHANISMS:
        model = AutoModelForCausalLM.from_pretrained(where)
        card = render_card(
            model, results=record.to_dict(), seed=run.seed, name=f"pretrain-{run.variant}"
        )
        card.save(where / "README.md")


if __name__ == "__main__":
    main()
