"""Training speed of a whole language model on one GPU: a mechanism against stock attention, in turns.

    python recipes/benchmark_model.py
    python recipes/benchmark_model.py --length 8192 --attention sdpa expressive implicit_kernel

One Llama of about 1.1 billion parameters in bfloat16, forward and backward, with and without gradient
checkpointing; every implementation runs on the same weights, one after the other in each turn. The
last line is a forward pass of attention over a million tokens. Results:
recipes/results/benchmark_model.json, medians of tokens a second with the slowest and fastest turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import environment
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_expressive
from hf_expressive.ops import expressive_attention


def model_config(length: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=length,
        use_cache=False,
    )


def seconds(step: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def model_speed(attention: list[str], length: int, turns: int) -> list[dict[str, Any]]:
    """Tokens a second of forward and backward for each kind of attention, checkpointing off and on."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(length), dtype=torch.bfloat16).cuda()
    model.train()
    tokens = torch.randint(0, 32000, (2, length), device="cuda")

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=True)

    rows = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        times: dict[str, list[float]] = {name: [] for name in attention}
        for turn in tqdm(range(turns + 1), desc=f"checkpointing {checkpointing}"):
            for name in attention:
                model.set_attn_implementation(name)
                step()
                elapsed = seconds(step)
                if turn:  # the first turn compiles
                    times[name].append(tokens.numel() / elapsed)
        rows += [
            {
                "attention": name,
                "gradient_checkpointing": checkpointing,
                "tokens_per_second": statistics.median(rates),
                "lowest": min(rates),
                "highest": max(rates),
                "ratio_to_first": statistics.median(rates) / statistics.median(times[attention[0]]),
            }
            for name, rates in times.items()
        ]
    return rows


def longest_forward(length: int) -> dict[str, Any]:
    """Whether one forward pass of this many tokens runs, and its peak memory beyond the operands."""
    query, key, value = (
        torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16)
        for heads in (8, 2, 2)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    elapsed = seconds(lambda: expressive_attention(query, key, value, is_causal=True))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"tokens": length, "heads": "8/2 of 128", "seconds": elapsed, "peak_MiB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", nargs="+", default=["sdpa", "expressive"], metavar="NAME")
    parser.add_argument("--length", type=int, default=4096, help="tokens a sequence")
    parser.add_argument("--turns", type=int, default=7, help="timed turns of each")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="commit to record (default: asks git)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; recipes/benchmark.py --device cpu does not")

    results = {
        "environment": environment("cuda", arguments.commit)
        | {"hf_expressive": hf_expressive.__version__},
        "model": model_speed(arguments.attention, arguments.length, arguments.turns),
        "longest": longest_forward(2**20),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "benchmark_model.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for row in results["model"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(results["longest"], path, sep="\n")


if __name__ == "__main__":
    main()
