"""Training on sequences shared by several GPUs: speed, memory, and the difference to one GPU.

    torchrun --standalone --nproc_per_node 4 recipes/benchmark_context_parallel.py
    torchrun --standalone --nproc_per_node 2 recipes/benchmark_context_parallel.py \\
        --length 131072 --attention expressive implicit_kernel:kernel=rbf,norm_dropout=0

A Llama of about 1.1 billion parameters in bfloat16 with gradient checkpointing; a step is forward,
backward and the average of the gradients. At --length the GPUs share the sequence. At --alone_length,
which has to fit on one GPU, they share it and each also does it alone: the ratio is the speed-up.
Loss and gradients of both are compared in float32 at --check_length. With --device cpu and small
sizes it runs through gloo. Results: recipes/results/benchmark_context_parallel.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import Attention
from benchmark import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedModel

import hf_expressive


def build(given: argparse.Namespace, attention: Attention, length: int) -> PreTrainedModel:
    """The same weights on every process."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=given.width,
        intermediate_size=given.width * 11 // 4,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=max(given.heads // 4, 1),
        max_position_embeddings=length,
        use_cache=False,
    )
    torch.manual_seed(0)
    with given.device:  # a GPU draws a billion numbers in no time
        model = attention.causal_lm(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def tokens(given: argparse.Namespace, length: int) -> dict[str, Tensor]:
    """A batch of one sequence, the same on every process."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32000, (1, length), generator=generator).to(given.device)
    return {"input_ids": ids, "labels": ids}


def shared_step(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Forward and backward of this process' share; its loss, whose mean over processes is the loss."""
    with hf_expressive.context_parallel(model, batch) as share:
        loss: Tensor = model(**share).loss
        loss.backward()
    return loss.detach()


def alone_step(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    loss.backward()
    return loss.detach()


def speed(
    given: argparse.Namespace,
    model: torch.nn.Module,
    step: Callable[[torch.nn.Module, dict[str, Tensor]], Tensor],
    length: int,
    turns: int,
    warm: bool = False,
) -> dict[str, Any]:
    """Median tokens a second and the largest peak of memory of a process.

    Args:
        warm: the kernels are compiled already, so the first turn counts too.
    """
    cuda = given.device.type == "cuda"
    batch = tokens(given, length)
    seconds = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rank = dist.get_rank()
    for turn in tqdm(range(warm, turns + 1), desc=f"{length} tokens", disable=rank != 0):
        dist.barrier()
        start = time.perf_counter()
        step(model, batch)
        model.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        if turn:  # the first turn compiles
            seconds.append(time.perf_counter() - start)
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)
    dist.all_reduce(peak := peak.to(given.device), op=dist.ReduceOp.MAX)
    rates = [length / elapsed for elapsed in seconds]
    return {
        "tokens": length,
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "peak_GiB": peak.item() if cuda else None,
    }


def difference(given: argparse.Namespace, attention: Attention) -> dict[str, float]:
    """Loss and gradients in float32, shared against alone; relative, the worst parameter."""
    length = given.check_length
    model = build(given, attention, length).float()
    batch = tokens(given, length)
    alone = alone_step(model, batch)
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    loss = shared_step(model, batch)
    dist.all_reduce(loss, op=dist.ReduceOp.SUM)
    errors = []
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        if grad is None or parameter.grad is None:
            raise RuntimeError("a parameter got a gradient in one of the two ways only.")
        dist.all_reduce(parameter.grad)
        mean = parameter.grad / dist.get_world_size()
        errors.append(float((mean - grad).abs().max() / grad.abs().max()))
    processes = dist.get_world_size()
    return {
        "tokens": length,
        "loss_alone": alone.item(),
        "loss_shared": loss.item() / processes,
        "gradient": max(errors),
    }


def examine(given: argparse.Namespace, text: str) -> dict[str, Any]:
    """Everything about one kind of attention."""
    attention = Attention.parse(text)
    compared = difference(given, attention)
    if given.device.type == "cuda":
        torch.cuda.empty_cache()
    model = build(given, attention, given.length)
    if given.device.type == "cuda":
        model = model.bfloat16()
    # Before the model is wrapped: a wrapped one would average its gradients here too.
    alone = speed(given, model, alone_step, given.alone_length, given.turns)
    together = DistributedDataParallel(model, gradient_as_bucket_view=True)
    result = {
        "attention": text,
        "difference": compared,
        "alone": alone,
        "shared": speed(given, together, shared_step, given.alone_length, given.turns),
        "long": speed(given, together, shared_step, given.length, given.long_turns, warm=True),
    }
    ratio = result["shared"]["tokens_per_second"] / result["alone"]["tokens_per_second"]
    return {**result, "speed_up": ratio, "efficiency": ratio / dist.get_world_size()}


def show(rows: list[dict[str, Any]], processes: int) -> None:
    table = Table(title=f"one sequence on {processes} devices", title_style="bold")
    columns = ("tokens", "devices", "tokens/s", "lowest – highest", "GiB a device")
    table.add_column("attention", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        for name, devices in (("alone", 1), ("shared", processes), ("long", processes)):
            part = row[name]
            peak = "–" if part["peak_GiB"] is None else f"{part['peak_GiB']:.1f}"
            table.add_row(
                row["attention"] if name == "alone" else "",
                f"{part['tokens']:,}",
                str(devices),
                f"{part['tokens_per_second']:,.0f}",
                f"{part['lowest']:,.0f} – {part['highest']:,.0f}",
                peak,
                end_section=name == "long",
            )
    console = Console(soft_wrap=True)
    console.print(table)
    for row in rows:
        found = row["difference"]
        console.print(
            f"{row['attention']}: {row['speed_up']:.2f} times one device, efficiency "
            f"{row['efficiency']:.2f}; float32 at {found['tokens']:,} tokens: loss "
            f"{found['loss_shared']:.6f} shared, {found['loss_alone']:.6f} alone, largest relative "
            f"difference of a gradient {found['gradient']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", nargs="+", default=["expressive"], metavar="KIND")
    parser.add_argument("--length", type=int, default=2**18, help="tokens that the devices share")
    parser.add_argument("--alone_length", type=int, default=2**15, help="tokens one device holds")
    parser.add_argument("--check_length", type=int, default=2**13, help="tokens to compare on")
    parser.add_argument("--turns", type=int, default=3, help="timed steps of each")
    parser.add_argument("--long_turns", type=int, default=1, help="timed steps at --length")
    parser.add_argument("--width", type=int, default=2048, help="hidden size")
    parser.add_argument("--layers", type=int, default=22, help="number of layers")
    parser.add_argument("--heads", type=int, default=16, help="query heads; four share a key")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="commit to record (default: asks git)")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu runs without, with small sizes")
    dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    if given.device == "cuda":
        local = rank % torch.cuda.device_count()
        torch.cuda.set_device(local)
        given.device = torch.device("cuda", local)
    given.device = torch.device(given.device)

    rows = [examine(given, text) for text in given.attention]
    if rank == 0:
        settings = {
            name: str(value) if isinstance(value, Path | torch.device) else value
            for name, value in vars(given).items()
            if name != "commit"
        }
        results = {
            "environment": environment(given.device.type, given.commit)
            | {"hf_expressive": hf_expressive.__version__, "processes": processes},
            "settings": settings,
            "results": rows,
        }
        given.output.mkdir(parents=True, exist_ok=True)
        path = given.output / "benchmark_context_parallel.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        show(rows, processes)
        print(path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
