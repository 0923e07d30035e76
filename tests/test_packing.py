"""Several sequences in one row, as data collators pack them, equal the sequences run alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokens
from tolerances import LOGITS
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_expressive import ExpressiveConfig, ImplicitKernelConfig, attach

LENGTHS = (5, 1, 4, 7)
_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=3))


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=4,
            initializer_range=0.5,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )


def _roberta() -> PreTrainedModel:
    config = RobertaConfig(**_SIZES, is_decoder=True, pad_token_id=1, hidden_dropout_prob=0.0)
    return RobertaForCausalLM(config)


#: Name → (model, position of a sequence's first token).
MODELS: dict[str, tuple[Any, int]] = {
    "llama": (llama, 0),
    "mistral, sliding": (_mistral, 0),
    "gpt2, absolute positions": (_gpt2, 0),
    "roberta, positions from 2": (_roberta, 2),
}
OPTIONS = {
    "expressive": ExpressiveConfig(scale="learned"),
    "direct": ImplicitKernelConfig(kernel="direct", num_features=8, norm_dropout=0.0),
}


def sequences() -> list[dict[str, list[int]]]:
    return [{"input_ids": tokens(length, 1)[0].tolist()} for length in LENGTHS]


def packed(start: int = 0, by: str = "positions") -> dict[str, Any]:
    """One row, by the collator; `by` says what tells the sequences apart."""
    collate = DataCollatorWithFlattening(
        position_ids_start=start, return_flash_attn_kwargs=by != "positions", return_tensors="pt"
    )
    batch: dict[str, Any] = dict(collate(sequences()))
    return batch


def model(name: str, mechanism: str = "expressive") -> PreTrainedModel:
    torch.manual_seed(0)
    # Differences of a rounding are no contamination: float64.
    return attach(MODELS[name][0]().eval(), OPTIONS[mechanism]).double()


def separate_loss(stock: PreTrainedModel) -> Tensor:
    """Mean loss a predicted token over the sequences, each run alone."""
    total, count = torch.zeros(()), 0
    for sequence in sequences():
        ids = torch.tensor([sequence["input_ids"]])
        if ids.shape[1] > 1:
            total = total + stock(ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def gradients(of: nn.Module) -> dict[str, Tensor]:
    found = {key: p.grad.clone() for key, p in of.named_parameters() if p.grad is not None}
    of.zero_grad()
    return found


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("by", ["positions", "lengths"])
@pytest.mark.parametrize("mechanism", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_collated_row(name: str, mechanism: str, by: str, use_cache: bool | None) -> None:
    """Logits, loss and gradients of a collated row are those of its sequences."""
    variant = model(name, mechanism)
    batch = packed(MODELS[name][1], by)
    options = {} if use_cache is None else {"use_cache": use_cache}
    out = variant(**batch, **options)
    alone = [variant(torch.tensor([s["input_ids"]])).logits for s in sequences()]
    assert (out.logits - torch.cat(alone, dim=1)).abs().max() < LOGITS
    out.loss.backward()
    together = gradients(variant)
    expected = separate_loss(variant)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    for key, value in gradients(variant).items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_rows_contaminate_without_the_boundaries() -> None:
    """The comparison sees contamination: with running positions the row is one sequence."""
    variant, batch = model("llama"), packed()
    batch["position_ids"] = torch.arange(sum(LENGTHS))[None]
    alone = [variant(torch.tensor([s["input_ids"]])).logits for s in sequences()]
    assert (variant(**batch).logits - torch.cat(alone, dim=1)).abs().max() > 1e-2


def test_encoder_by_cumulative_lengths() -> None:
    """An encoder's positions may mean anything; lengths are what separates its sequences."""
    variant = attach(BertModel(BertConfig(**_SIZES)).eval(), ExpressiveConfig())
    batch = packed(by="lengths")
    batch.pop("labels")
    alone = [variant(torch.tensor([s["input_ids"]])).last_hidden_state for s in sequences()]
    out = variant(**batch).last_hidden_state
    assert (out - torch.cat(alone, dim=1)).abs().max() < LOGITS


def test_lengths_of_several_rows_are_refused() -> None:
    lengths = torch.tensor([0, 9, 18], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q describes the sequences of one row"):
        model("llama")(tokens(9, 2), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


@pytest.mark.parametrize("by", ["positions", "lengths"])
def test_trainer(by: str, tmp_path: Path) -> None:
    """Two optimiser steps of `Trainer` on packed rows are two steps on the sequences alone."""
    trained = model("llama").train()
    expected = copy.deepcopy(trained)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=by == "lengths")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(LENGTHS),
        max_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(trained, arguments, collate, train_dataset=sequences()).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    before = copy.deepcopy(expected.state_dict())
    for _ in range(2):
        separate_loss(expected).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    moved = [
        key for key, value in before.items() if not torch.equal(value, expected.state_dict()[key])
    ]
    assert any("log_gain" in key for key in moved)


class _Graphs:
    """A compiler backend that runs graphs as they are and remembers how many and how large."""

    def __init__(self) -> None:
        self.count = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor):
                self.shapes.add(tuple(int(size) for size in value.shape))
        return graph.forward


@torch.no_grad()
@pytest.mark.parametrize("by", ["positions", "lengths"])
@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str, use_cache: bool | None, by: str) -> None:
    """Under `torch.compile`, where nobody can look at the positions, rows are told apart as well."""
    variant, batch = model(name), packed(MODELS[name][1], by)
    batch.pop("labels")
    options = {} if use_cache is None else {"use_cache": use_cache}
    alone = [variant(torch.tensor([s["input_ids"]])).logits for s in sequences()]
    torch.compiler.reset()
    graphs = _Graphs()
    out = torch.compile(variant, fullgraph=True, dynamic=False, backend=graphs)(**batch, **options)
    assert (out.logits - torch.cat(alone, dim=1)).abs().max() < LOGITS
    assert graphs.count == 1
    total = sum(LENGTHS)
    square = {shape for shape in graphs.shapes if shape[-2:] == (total, total)}
    # A compact mask counts as one tensor of the size it stands for; nothing else may have it.
    dense = {shape for shape in square if shape != (1, 1, total, total)}
    assert not dense or "sliding" in name, dense


@torch.no_grad()
def test_compiled_row_of_one_sequence() -> None:
    """Neither running positions nor none at all make compiled code see a boundary."""
    variant, ids = model("llama"), tokens(9)
    for options in ({}, {"position_ids": torch.arange(9)[None]}, {"use_cache": False}):
        torch.compiler.reset()
        compiled = torch.compile(variant, fullgraph=True, backend="aot_eager")
        assert (compiled(ids, **options).logits - variant(ids).logits).abs().max() < LOGITS
