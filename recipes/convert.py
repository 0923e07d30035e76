"""A pretrained softmax checkpoint to hf_expressive's attention: transfer, distil, measure, save.

    accelerate launch recipes/convert.py --checkpoint sentence-transformers/all-MiniLM-L6-v2
    accelerate launch recipes/convert.py --checkpoint openai-community/gpt2 --text my.txt \\
        --attention expressive:scale=learned,softmax_heads=6 --seeds 0

Stage 1 teaches every attention layer to reproduce the softmax layer's output on the softmax layer's
input, all layers in one pass. Stage 2 trains the whole model, by LoRA or in full: encoders to give
the original's embeddings, language models on cross-entropy and the original's predictions. The
original runs in the same process.

Measured: the original, the variant untouched, after stage 1, after stage 2; and the finished variant
with its mechanism replaced by uniform weights or by nothing. If that changes little, the model has
learned to do without its attention, and the conversion has failed however good the figures are.

The same command again goes on where it was stopped, with the same result; with further kinds of
attention or seeds it adds them. The output folder gets results.json, its table and picture
(convert.txt, convert.png), and a folder for each finished model with tokenizer and model card.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from arguments import Attention, parse
from conversion.objectives import Objective, objective_of
from conversion.options import ConversionOptions, ResultOptions, TransferOptions, TuningOptions
from conversion.report import LOSSLESS, plot_conversion, print_conversion
from conversion.run import Conversion, convert
from conversion.text import TextOptions
from conversion.transfer import as_teacher
from loop import STOPPED, Stopped
from reporting import Record, Run, environment, write_text
from rich.console import Console
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from hf_expressive.hub import render_card

#: Settings that may differ between commands on one folder: runs of further kinds of attention and
#: seeds are added to those that are there, and how often a state is saved changes no result.
_FREE = ("attention", "seeds", "checkpoint_every")


def prepare(
    accelerator: Accelerator,
    options: ConversionOptions,
    text: TextOptions,
    transfer: TransferOptions,
    tuning: TuningOptions,
    folder: Path,
) -> Conversion:
    """Loads the checkpoint, measures it and makes it the teacher.

    Raises:
        ValueError, OSError: a checkpoint or text that cannot be read or converted.
    """
    config = AutoConfig.from_pretrained(options.checkpoint)
    architecture = (config.architectures or [""])[0]
    with accelerator.main_process_first():  # the others read what the first one has cached
        objective: Objective = objective_of(
            options.checkpoint, architecture, text, tuning.distillation
        )
    model = objective.auto_class.from_pretrained(options.checkpoint, dtype=torch.float32)
    model.to(accelerator.device)
    validation = accelerator.prepare(objective.validation_loader(options.batch_size))
    original = objective.evaluate(accelerator, model, validation)
    return Conversion(
        accelerator=accelerator,
        objective=objective,
        options=options,
        transfer=transfer,
        tuning=tuning,
        original=original,
        base=objective.score(original, original),
        teacher=as_teacher(model),
        validation=validation,
        folder=folder,
    )


def check_settings(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Keeps the settings beside the results; other settings do not go on with what is there.

    Raises:
        ValueError: the folder holds another conversion; the message names the first difference.
    """
    path = folder / "settings.json"
    if path.exists() and overwrite:
        shutil.rmtree(folder)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if name not in _FREE and before.get(name) != value:
                raise ValueError(
                    f"{folder} holds a conversion with --{name} {before.get(name)}, not {value}; "
                    "choose another --output_dir, or pass --overwrite."
                )
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def finished(folder: Path, kinds: Sequence[Attention]) -> list[Run]:
    """Every finished run of a folder, by kind of attention, those of this command first, and seed."""
    notes = [
        json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/progress.json")
    ]
    runs = [Run(**note["run"]) for note in notes if "run" in note]
    asked = [kind.text for kind in kinds]
    order = asked + sorted({run.variant for run in runs} - set(asked))
    return sorted(runs, key=lambda run: (order.index(run.variant), run.seed))


def describe(task: Conversion, base_model: str) -> dict[str, Any]:
    """The task in the terms of `reporting.Record`."""
    tuning = task.tuning
    how = f"LoRA of rank {tuning.lora_rank}" if tuning.tuning == "lora" else "all weights"
    training = (
        f"Converted from {base_model} in two stages. First each attention layer learned to reproduce "
        f"the output of the softmax layer on the same input ({task.transfer.transfer_steps} steps); "
        f"then the model learned to reproduce the original's outputs ({tuning.tuning_steps} steps, "
        f"{how}). A kind of attention that computes the same as softmax is left as it is."
    )
    limits = [
        f"It was converted on {task.objective.text.name} alone; other text may have suffered more."
    ]
    return {**task.objective.describe(), "training": training, "limits": limits}


def about(
    task: Conversion, runs: list[Run], base_model: str, license: str | None
) -> dict[str, Any]:
    """What the card of the best variant that had to learn tells beyond the record; its first seed."""
    key = task.objective.metric_key
    learned = [run for run in runs if not lossless(run)] or runs
    sign = 1 if task.objective.higher_is_better else -1
    means = {
        variant: sum(values) / len(values)
        for variant in dict.fromkeys(run.variant for run in learned)
        if (values := [sign * run.final[key] for run in learned if run.variant == variant])
    }
    variant = max(means, key=means.__getitem__)
    run = next(run for run in learned if run.variant == variant)
    mechanism = str(run.attention["mechanism"])
    found = {
        "architecture": type(task.teacher).__name__,
        "variant": variant,
        "seed": run.seed,
        # A name that the Hub takes.
        "name": f"{Path(base_model).name}-{mechanism.replace('_', '-')}",
        "license": license,
        **lineage(base_model),
    }
    return {name: value for name, value in found.items() if value is not None}


def lossless(run: Run) -> bool:
    """Whether the variant computed what softmax computes before it had learned anything."""
    errors = [value for name, value in run.final.items() if name.startswith("error_swapped_")]
    return max(errors) < LOSSLESS


def lineage(base_model: str) -> dict[str, str]:
    """Where a model comes from, if that has a name on the Hub."""
    if Path(base_model).exists():
        return {}
    return {"base_model": base_model, "base_model_relation": "finetune"}


def main() -> None:
    options, text, transfer, tuning, output = parse(
        [ConversionOptions, TextOptions, TransferOptions, TuningOptions, ResultOptions],
        "convert.py",
        __doc__,
    )
    disable_progress_bar()  # Transformers' bars for loading
    set_verbosity_error()  # and its report of parameters that a softmax checkpoint cannot have
    # Raised by PEFT, which reads an attribute that Transformers has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    folder = Path(output.output_dir or "outputs/convert")
    accelerator = Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        # A batch is divided among the processes, so that their number does not change the result.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=None if output.report_to == "none" else output.report_to,
        project_dir=folder,
    )
    parts = accelerator.num_processes * options.gradient_accumulation_steps
    if options.batch_size % parts:
        sys.exit(
            f"error: --batch_size must be a multiple of {parts}, processes × accumulated batches; "
            f"got {options.batch_size}."
        )
    chosen = (options, text, transfer, tuning)
    settings = {key: value for part in chosen for key, value in asdict(part).items()}
    try:
        with accelerator.main_process_first():
            check_settings(folder, settings, output.overwrite and accelerator.is_main_process)
        task = prepare(accelerator, *chosen, folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    # Trackers take no lists.
    accelerator.init_trackers("convert", {key: str(value) for key, value in settings.items()})
    kinds = Attention.parse_all(options.attention)
    try:
        for seed in options.seeds:
            for kind in kinds:
                convert(task, kind, seed)
    except Stopped as stopped:
        print(f"{stopped} The same command goes on from there.", file=sys.stderr)
        sys.exit(STOPPED)
    base_model = output.base_model or options.checkpoint
    runs = finished(folder, kinds)
    settings |= {
        "checkpoint": base_model,
        "attention": list(dict.fromkeys(run.variant for run in runs)),
        "seeds": sorted({run.seed for run in runs}),
    }
    record = Record(
        recipe="convert",
        task=describe(task, base_model),
        settings=settings,
        runs=runs,
        environment=environment(accelerator),
        card=about(task, runs, base_model, output.license),
    )
    if accelerator.is_main_process:
        console = Console(soft_wrap=True)
        record.save(folder / "results.json")
        plot_conversion(record, folder / "convert.png")
        print_conversion(record, console)
        table = Console(file=io.StringIO(), width=120, record=True)
        print_conversion(record, table)
        write_text(folder / "convert.txt", table.export_text())
        for run in runs:
            where = folder / str(run.folder)
            card = render_card(
                task.objective.auto_class.from_pretrained(where),
                results={**record.to_dict(), "card": {}},
                variant=run.variant,
                seed=run.seed,
                name=f"{Path(base_model).name}-{run.folder}",
                license=output.license,
                **lineage(base_model),
            )
            card.save(where / "README.md")
        console.print(f"{folder / 'results.json'}, convert.txt and convert.png written")
    accelerator.end_training()


if __name__ == "__main__":
    main()
