"""Tokens a second of pretrain.py: against stock Transformers, and over several GPUs.

    python recipes/benchmark_training.py
    python recipes/benchmark_training.py --cases recipe:sdpa trainer:sdpa recipe:expressive

Every case trains the same Llama of about a billion parameters (or whatever the options of pretrain.py
behind `--` say) for --steps steps, in bfloat16, with the same rows a GPU, and counts the second half:

    recipe:<attention>          pretrain.py on one GPU
    compiled:<attention>        the same with --compile layers
    trainer:<attention>         stock `Trainer` on one GPU, the same model, optimiser and rows
    ddp:<attention>             pretrain.py on two GPUs, weights on each
    fsdp2:<attention>           the same, weights divided

Cases of one GPU run side by side on different GPUs. Results: training.json with tokens a second, model
FLOPs utilisation, and the ratios that matter: recipe over trainer, two GPUs over twice one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from reporting import environment, write_text

RECIPES = Path(__file__).parent

#: Options of pretrain.py: a Llama of 1.0 billion parameters on bytes.
_MODEL = (
    *("--width", "2048", "--layers", "22", "--heads", "16", "--kv_heads", "4"),
    *("--config_overrides", "intermediate_size=5632"),
    *("--length", "4096", "--documents", "joined", "--validation_rows", "8"),
)
_CONFIGS = {
    "recipe": "single_gpu",
    "compiled": "single_gpu",
    "trainer": "single_gpu",
    "ddp": "ddp",
    "fsdp2": "fsdp2",
}


def command(
    case: str, rows: int, steps: int, options: Sequence[str], folder: Path, port: int
) -> list[str]:
    kind, _, attention = case.partition(":")
    gpus = 2 if kind in ("ddp", "fsdp2") else 1
    script = [
        str(RECIPES / "pretrain.py"),
        "--no_save_model",
        "--checkpoint_every",
        str(10 * steps),
    ]
    if kind == "trainer":
        script = [str(RECIPES / "benchmark_training.py"), "--trainer"]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(RECIPES / "configs" / f"{_CONFIGS[kind]}.yaml")),
        *("--main_process_port", str(port)),
        *script,
        *options,
        *(("--compile", "layers") if kind == "compiled" else ()),
        *("--attention", attention, "--steps", str(steps), "--warmup_steps", "2"),
        *("--evaluate_every", str(steps // 2), "--batch_size", str(rows * gpus)),
        *("--output_dir", str(folder)),
    ]


def train_with_trainer(words: Sequence[str]) -> None:
    """`Trainer` with the model and rows of pretrain.py; curve.json like that recipe's."""
    import pretrain
    from arguments import Attention
    from text import Text, TextOptions
    from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

    text_options, model_options, training, output = HfArgumentParser(
        [TextOptions, pretrain.ModelOptions, pretrain.PretrainOptions, pretrain.RunOptions]  # type: ignore[arg-type]
    ).parse_args_into_dataclasses(list(words))
    text = Text(text_options)
    config = pretrain.model_config(model_options, text)
    model = Attention.parse(model_options.attention).causal_lm(config)
    rows = text.rows(text.train).with_format("torch")
    half = training.steps // 2
    moments: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (half, training.steps):
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                moments[state.global_step] = time.perf_counter()

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.stack([row["input_ids"] for row in batch]).long()
        return {"input_ids": ids, "labels": ids}

    arguments = TrainingArguments(
        output_dir=output.output_dir,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        bf16=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup_steps,
        optim="adamw_torch_fused",
        logging_steps=training.log_every,
        save_strategy="no",
        report_to="none",
        seed=training.seed,
    )
    Trainer(
        model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Clock()]
    ).train()
    tokens = training.batch_size * text_options.length * (training.steps - half)
    rate = tokens / (moments[training.steps] - moments[half])
    result = {"tokens_per_second": [None, None, rate]}
    write_text(Path(output.output_dir) / "results.json", json.dumps({"runs": [{"curve": result}]}))


def measure(cases: Sequence[str], rows: int, steps: int, options: Sequence[str]) -> dict[str, Any]:
    """Curves of all cases; those that fit beside each other run at the same time."""
    every = ",".join(map(str, range(torch.cuda.device_count())))
    free = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    waiting, running, found = list(cases), {}, {}
    while waiting or running:
        for case in list(waiting):
            gpus = 2 if case.partition(":")[0] in ("ddp", "fsdp2") else 1
            if len(free) >= gpus:
                mine, free = free[:gpus], free[gpus:]
                folder = Path(tempfile.mkdtemp())
                port = 29600 + list(cases).index(case)  # cases at the same time must not share one
                process = subprocess.Popen(
                    command(case, rows, steps, options, folder, port),
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(mine)},
                    stdout=(folder / "log.txt").open("wb"),
                    stderr=subprocess.STDOUT,
                )
                running[process] = (case, mine, folder)
                waiting.remove(case)
        time.sleep(0.2)
        for process in [process for process in running if process.poll() is not None]:
            case, mine, folder = running.pop(process)
            free += mine
            if process.returncode != 0:
                tail = (folder / "log.txt").read_text(errors="replace")[-2000:]
                print(f"{case} failed:\n{tail}", flush=True)
                continue
            content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            curve = content["runs"][0]["curve"]
            found[case] = {
                "gpus": len(mine),
                "tokens_per_second": curve["tokens_per_second"][-1],
                "mfu": curve.get("mfu", [None])[-1],
            }
            print(case, found[case], flush=True)
    return found


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Recipe over trainer for the same attention or softmax, and the efficiency of several GPUs."""
    rate = {case: entry["tokens_per_second"] for case, entry in found.items()}
    result = {}
    for case, entry in found.items():
        kind, _, attention = case.partition(":")
        if kind in ("recipe", "compiled"):
            for other in (f"trainer:{attention}", "trainer:sdpa"):
                if other in rate:
                    result[f"{case} / {other}"] = rate[case] / rate[other]
        one = f"recipe:{attention}"
        if entry["gpus"] > 1 and one in rate:
            result[f"{case} / {entry['gpus']} × {one}"] = rate[case] / (entry["gpus"] * rate[one])
    return result


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--trainer"]:
        train_with_trainer(words[1:])
        return
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        usage="python recipes/benchmark_training.py [options] [-- options of pretrain.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = [
        "ddp:expressive",
        "recipe:sdpa",
        "trainer:sdpa",
        "recipe:expressive",
        "compiled:sdpa",
        "compiled:expressive",
        "fsdp2:expressive",
    ]
    parser.add_argument("--cases", nargs="+", default=default, help=f"default: {' '.join(default)}")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step on each GPU")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RECIPES / "results" / "training.json")
    given, options = parser.parse_args(words[:split]), words[split + 1 :]
    if torch.cuda.device_count() < 1:
        parser.error("this benchmark needs a GPU.")
    options = [*_MODEL, *options]
    found = measure(given.cases, given.rows, given.steps, options)
    results = {
        "recipe": "benchmark_training",
        "options": {"rows": given.rows, "steps": given.steps, "pretrain": options},
        "cases": found,
        "ratios": ratios(found),
        "environment": environment(Accelerator()),
    }
    write_text(given.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    for name, value in results["ratios"].items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
