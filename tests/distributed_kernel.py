"""Two training steps of a model with learned noise, by one process or by several; its trained tensors.

    torchrun --nproc_per_node 2 distributed_kernel.py ddp,fsdp,fsdp-meta FOLDER

Every rank writes FOLDER/<way>-<rank>.pt: losses, gradients of the first step, and the trained state.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_expressive import ImplicitKernelConfig, auxiliary_loss

ROWS = torch.randint(1, 60, (8, 7), generator=torch.Generator().manual_seed(0))
STEPS, MICRO_BATCHES = 2, 2
#: The regulariser of a data set as small as this one is not small.
SAMPLES = len(ROWS)


def build() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
    )
    options = ImplicitKernelConfig(kernel="copula", p="learned", norm_dropout=0.0)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="implicit_kernel", hf_expressive=options
    )


def shard(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def prepare(way: str) -> Any:
    """A model in training mode, the same weights in every way."""
    if way == "fsdp-meta":
        weights = build().state_dict()
        with torch.device("meta"):
            model = build()
        assert all(parameter.is_meta for parameter in model.parameters())
        shard(model).to_empty(device="cpu")
        model.init_weights()
        fresh = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        own = {name: value for name, value in fresh.items() if ".mechanism." in name}
        assert own
        # Values of an initialisation, not of memory as it was found.
        assert all(value.isfinite().all() and value.abs().max() < 10 for value in own.values())
        assert not any(value.any() for name, value in own.items() if "log_exponent" in name)
        assert all(torch.equal(weights[name], own[name]) for name in own if "sample" in name)
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        return model.train()
    model = build().train()
    if way == "ddp":
        return DistributedDataParallel(model)
    return shard(model) if way == "fsdp" else model


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: Any, way: str, rank: int, world: int) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], {}
    for step in range(STEPS):
        of_step = ROWS.unflatten(0, (STEPS, -1))[step]
        mine = of_step.unflatten(0, (world, -1))[rank]
        for number, rows in enumerate(mine.unflatten(0, (MICRO_BATCHES, -1))):
            last = number == MICRO_BATCHES - 1
            if way.startswith("fsdp"):
                model.set_requires_gradient_sync(last)
            waits = way == "ddp" and not last
            with model.no_sync() if waits else contextlib.nullcontext():
                loss = model(input_ids=rows, labels=rows).loss + auxiliary_loss(model) / SAMPLES
                (loss / MICRO_BATCHES).backward()
            losses.append(loss.detach())
        if step == 0:
            gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    state = {name: full(value) for name, value in model.state_dict().items()}
    mean = torch.stack(losses).unflatten(0, (STEPS, -1)).mean(dim=1)
    if world > 1:
        dist.all_reduce(mean)
    return {"losses": mean / world, "gradients": bare(gradients), "state": bare(state)}


def bare(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in named.items()}


def main(ways: str, folder: str) -> None:
    # The same noise for every micro-batch, however they are spread.
    torch.randn_like = torch.ones_like
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for way in ways.split(","):
        torch.save(train(prepare(way), way, rank, world), Path(folder) / f"{way}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
