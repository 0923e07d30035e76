"""Cases of a sequence shared by processes, each against one process with the whole batch.

Run as a program, with the file to write: forks processes that talk through gloo and writes, for each
number of processes and each case, the largest relative differences of loss and gradients.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertForTokenClassification,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import hf_expressive
from hf_expressive import ExpressiveConfig, ImplicitKernelConfig
from hf_expressive.attention.sequence_share import SequenceShare

sys.path.insert(0, str(Path(__file__).parent))
import tiny

PROCESSES = (2, 4)
#: Divisible by neither number of chunks.
LENGTH = 19


def ids(length: int = LENGTH, batch: int = 2) -> Tensor:
    return tiny.tokens(length, batch)


def run(
    model: PreTrainedModel,
    batch: dict[str, Any],
    loss: Callable[[Any, dict[str, Any]], Tensor] = lambda out, _: out.loss,
    backward_inside: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, float]:
    """Relative differences between the shares together and the whole."""
    model.to(dtype)
    keywords = {} if "token_type_ids" in batch else {"use_cache": False}
    whole = model(**batch, **keywords)
    expected = loss(whole, batch)
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(".mechanism." in n for n in wanted) or not has_parameters(model), "idle mechanism"
    model.zero_grad()

    with hf_expressive.context_parallel(model, batch) as share:
        out = model(**share, **keywords)
        value = loss(out, share)
        if backward_inside:
            value.backward()
    if not backward_inside:
        value.backward()
    group = dist.group.WORLD
    dist.all_reduce(mean := value.detach().clone())
    errors = [difference(mean / group.size(), expected.detach())]
    for name, parameter in model.named_parameters():
        if name in wanted:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad)
            errors.append(difference(grad / group.size(), wanted[name]))
    logits = SequenceShare(group, batch["input_ids"].shape[1], torch.device("cpu")).gather(
        out.logits
    )
    return {
        "loss": errors[0],
        "gradients": max(errors[1:]),
        "outputs": difference(logits, whole.logits),
    }


def has_parameters(model: nn.Module) -> bool:
    return any(".mechanism." in name for name, _ in model.named_parameters())


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max().clamp_min(1e-12))


def causal(config: Any, batch: dict[str, Any] | None = None, **options: Any) -> dict[str, float]:
    """A Llama with grouped heads."""
    backward_inside = options.pop("backward_inside", True)
    model = hf_expressive.attach(tiny.llama(**options), config)
    if not backward_inside:
        for layer in model.train().model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    for index, parameter in enumerate(model.parameters()):
        # Gains and exponents away from where they start.
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.arange(parameter.numel()).sin() + 0.01 * index
    tokens = ids()
    batch = {"input_ids": tokens, "labels": tokens} | (batch or {})
    return run(model, batch, backward_inside=backward_inside)


def padding(side: str) -> dict[str, Any]:
    mask = torch.ones_like(ids())
    mask[1, 11:] = 0
    mask = mask.flip(1) if side == "left" else mask
    tokens = ids()
    return {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "labels": tokens.masked_fill(mask == 0, -100),
    }


def packed() -> dict[str, Any]:
    return {"position_ids": torch.cat([torch.arange(n) for n in (7, 4, 8)])[None].expand(2, -1)}


def sliding_window() -> dict[str, float]:
    config = MistralConfig(**tiny.llama_config().to_diff_dict() | {"model_type": "mistral"})
    config.sliding_window = 5
    torch.manual_seed(0)
    model = hf_expressive.attach(
        MistralForCausalLM(config).eval(), ExpressiveConfig(scale="learned")
    )
    return run(model, {"input_ids": ids(), "labels": ids()})


def sinks() -> dict[str, float]:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=5,
        initializer_range=0.5,
    )
    model = hf_expressive.attach(GptOssForCausalLM(config).eval(), ExpressiveConfig())
    # Its experts take no float64.
    return run(model, {"input_ids": ids(), "labels": ids()}, dtype=torch.float32)


def bert(options: ImplicitKernelConfig) -> BertForTokenClassification:
    torch.manual_seed(0)
    config = tiny.bert_config(num_labels=3)
    return hf_expressive.attach(BertForTokenClassification(config).eval(), options)


def encoder() -> dict[str, float]:
    """Every position sees all others; the loss is the mean of the logits' squares over positions."""
    model = bert(ImplicitKernelConfig(num_features=8, norm_dropout=0.0))
    batch = {
        "input_ids": ids(),
        "attention_mask": padding("right")["attention_mask"],
        "position_ids": torch.arange(LENGTH)[None],
        "token_type_ids": (torch.arange(LENGTH) > 8).long().expand(2, -1),
    }

    def loss(out: Any, given: dict[str, Any]) -> Tensor:
        # Averaged over the processes, a share's sum counts once.
        whole = given["input_ids"].shape[1] == LENGTH
        return out.logits.square().sum() * (1 if whole else dist.get_world_size()) / LENGTH

    return run(model, batch, loss)


def mean_query() -> dict[str, float]:
    model = bert(ImplicitKernelConfig(kernel="implicit", num_features=4, condition="mean"))
    try:
        with hf_expressive.context_parallel(model, {"input_ids": ids()}) as share:
            model(**share)
    except ValueError as error:
        return {"refused": float("context parallel" in str(error))}
    return {"refused": 0.0}


def noise() -> dict[str, float]:
    """Frequencies drawn anew at each pass and dropped magnitudes, the processes seeded alike."""
    options = ImplicitKernelConfig(kernel="copula", num_features=8, norm_dropout=0.3)
    model = hf_expressive.attach(tiny.llama(), options).train()
    model.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)
    return run(model, {"input_ids": ids(), "labels": ids()})


def training() -> dict[str, float]:
    """Six steps of AdamW under DDP: the losses, and the weights after them."""
    batches = [
        {"input_ids": t, "labels": t}
        for t in (tiny.tokens(LENGTH + i, 2).roll(i, 1) for i in range(6))
    ]

    def losses(shared: bool) -> tuple[list[float], nn.Module]:
        model = hf_expressive.attach(tiny.llama().double(), ExpressiveConfig(scale="learned"))
        model.train()
        wrapped = DistributedDataParallel(model) if shared else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        values = []
        for batch in batches:
            if shared:
                with hf_expressive.context_parallel(wrapped, batch) as share:
                    loss = wrapped(**share, use_cache=False).loss
                    loss.backward()
                dist.all_reduce(value := loss.detach().clone())
                values.append(float(value) / dist.get_world_size())
            else:
                loss = model(**batch, use_cache=False).loss
                loss.backward()
                values.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        return values, model

    alone, model = losses(shared=False)
    together, other = losses(shared=True)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return {
        "loss": max(abs(a - b) / a for a, b in zip(alone, together, strict=True)),
        "learned": alone[0] - alone[-1],
        "weights": max(difference(b.detach(), a.detach()) for a, b in pairs),
    }


def gathering() -> dict[str, float]:
    """The exchange itself, in half precision: values exact, gradients summed in float32."""
    group = dist.group.WORLD
    share = SequenceShare(group, LENGTH, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(2, 3, LENGTH, 5, generator=generator).bfloat16()
    own = share.take(whole, 2).requires_grad_()
    gathered = share.gather(own, 2)
    assert share.own_length == own.shape[2]
    weights = torch.randn(group.size(), *whole.shape, generator=generator).bfloat16()
    (gathered * weights[group.rank()]).sum().backward()
    assert own.grad is not None
    wanted = share.take(weights.float().sum(0).bfloat16(), 2)
    return {
        "values": difference(gathered, whole),
        "gradients": difference(own.grad.float(), wanted.float()),
    }


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "gathering": gathering,
    "expressive": lambda: causal(ExpressiveConfig()),
    "learned gain, power 2": lambda: causal(ExpressiveConfig(scale="learned", power=2)),
    "softmax layer": lambda: causal(ExpressiveConfig(softmax_layers=[0])),
    "softmax heads": lambda: causal(ExpressiveConfig(scale="learned", softmax_heads=2)),
    "direct kernel": lambda: causal(ImplicitKernelConfig(num_features=8, norm_dropout=0.0)),
    "rbf kernel, learned p": lambda: causal(
        ImplicitKernelConfig(kernel="rbf", p="learned", norm_dropout=0.0)
    ),
    "left padding": lambda: causal(ExpressiveConfig(), padding("left")),
    "right padding": lambda: causal(ExpressiveConfig(), padding("right")),
    "packed": lambda: causal(ExpressiveConfig(), packed()),
    "gradient checkpointing": lambda: causal(ExpressiveConfig(), backward_inside=False),
    "sliding window": sliding_window,
    "sinks": sinks,
    "encoder": encoder,
    "noise": noise,
    "mean query": mean_query,
    "training": training,
}


def work(rank: int, size: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        try:
            found[name] = case()
        except Exception:  # reported by the test of this case
            found[name] = traceback.format_exc()
            break  # the processes are no longer in step
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def main() -> None:
    context = multiprocessing.get_context("fork")
    found = {}
    for size in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            results = context.SimpleQueue()
            workers = [
                context.Process(target=work, args=(rank, size, f"{folder}/store", results))
                for rank in range(size)
            ]
            for worker in workers:
                worker.start()
            found[size] = results.get()
            for worker in workers:
                worker.join(30)
                worker.kill()
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
