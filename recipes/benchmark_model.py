"""Training speed of a whole language model on one GPU: a mechanism against stock attention, in turns.

    python recipes/benchmark_model.py
    python recipes/benchmark_model.py --length 8192 --attention sdpa expressive implicit_kernel

One Llama of about 1.1 billion parameters in bfloat16, forward and backward, with and without gradient
checkpointing; every implementation runs on the same weights, one after the other in each turn. The
last lines compare left-padded, packed and sliding-window batches with their share of the work.
Results: recipes/results/benchmark_model.json, medians of tokens a second with the slowest and fastest
turn.
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
from hf_expressive.ops import KeyRanges, expressive_attention


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


def masked_batches(length: int) -> dict[str, KeyRanges]:
    """Batches of four that see less than a causal one."""
    index = torch.arange(length, device="cuda", dtype=torch.int32)[None]
    half, eighth = length // 2, length // 8
    zero = torch.zeros_like(index)
    late = index.expand(4, -1) >= half
    return {
        "left padding, half": KeyRanges((zero + half).expand(4, -1), (index + 1).expand(4, -1)),
        "left padding, half, as keys": KeyRanges(zero, index + 1, late),
        "packed, eight sequences": KeyRanges(index // eighth * eighth, index + 1),
        "sliding window, an eighth": KeyRanges((index + 1 - eighth).clamp(min=0), index + 1),
    }


def touched(pattern: KeyRanges | None, length: int, rows: int = 128, keys: int = 64) -> float:
    """Pairs of a query and a key in the tiles that hold any visible pair: the work of ideal kernels.

    No kernel built on matrix units works on less than whole tiles, so that a triangle of 1,024
    positions costs it an eighth more than its visible pairs.
    """
    if pattern is None:
        index = torch.arange(length, device="cuda")[None]
        pattern = KeyRanges(torch.zeros_like(index), index + 1)
    start, end = pattern.start[:1].long(), pattern.end[:1].long()
    if pattern.keys is not None:
        start = start.clamp(min=int(pattern.keys[0].int().argmax()))
    empty = start >= end
    first = start.masked_fill(empty, length).unflatten(1, (-1, rows)).amin(-1) // keys
    last = -(-end.masked_fill(empty, 0).unflatten(1, (-1, rows)).amax(-1) // keys)
    return float((last - first).clamp(min=0).sum() * rows * keys)


def visible_share(length: int, turns: int) -> list[dict[str, Any]]:
    """Time of masked batches over their share of the causal batch's time, forward and backward.

    `over_pairs` divides by the share of visible pairs, `over_tiles` by that of the tiles that hold one.
    Several calls are launched in a row, as in training, so that the GPU does not wait for the host.
    """
    shape = (4, 16, length, 128)
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def times(**mask: Any) -> tuple[float, float]:
        def forward() -> torch.Tensor:
            return expressive_attention(*leaves, **mask)

        def repeat(call: Callable[[], Any]) -> Callable[[], None]:
            def calls() -> None:
                for _ in range(8):
                    call()

            return calls

        out = forward()

        def backward() -> Any:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        backward()
        with torch.no_grad():
            first = seconds(repeat(forward))
        return first, seconds(repeat(backward))

    rows = []
    for name, pattern in masked_batches(length).items():
        dense = pattern.dense(length)[0, 0]
        pairs = float(dense.sum(dtype=torch.float64)) / (length * (length + 1) / 2)
        tiles = touched(pattern, length) / touched(None, length)
        ratios = []
        for turn in range(turns + 1):
            masked, causal = times(attention_mask=pattern), times(is_causal=True)
            if turn:
                ratios.append([part / whole for part, whole in zip(masked, causal, strict=True)])
        for what, values in zip(("forward", "backward"), zip(*ratios, strict=True), strict=True):
            ratio = statistics.median(values)
            rows.append(
                {
                    "batch": name,
                    "pass": what,
                    "share_of_pairs": pairs,
                    "share_of_tiles": tiles,
                    "time_ratio": ratio,
                    "lowest": min(values),
                    "highest": max(values),
                    "over_pairs": ratio / pairs,
                    "over_tiles": ratio / tiles,
                }
            )
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
        "visible_share": visible_share(2 * arguments.length, arguments.turns),
        "longest": longest_forward(2**20),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "benchmark_model.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name in ("model", "visible_share"):
        for row in results[name]:
            print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(results["longest"], path, sep="\n")


if __name__ == "__main__":
    main()
