"""Exported programs: `torch.export` with free lengths, and ONNX in another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, llama, tokens
from tolerances import LOGITS
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from hf_expressive import ExpressiveConfig, ImplicitKernelConfig, attach

LENGTH = torch.export.Dim("length", min=2, max=64)
BATCH = torch.export.Dim("batch", min=1, max=8)


def encoder() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.5,
        )
    ).eval()


def padded(length: int, batch: int = 2) -> dict[str, Tensor]:
    ids = tokens(length, batch)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        ExpressiveConfig(scale="learned"),
        ImplicitKernelConfig(kernel="direct", num_features=8, norm_dropout=0.0),
    ],
    ids=["expressive", "direct"],
)
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_export(kind: str, options: Any, with_mask: bool, tmp_path: Path) -> None:
    """One program for all batches and lengths, the same after saving and loading."""
    variant = attach(llama() if kind == "decoder" else encoder(), options)
    names = ["input_ids"] + ["attention_mask"] * with_mask
    fixed: dict[str, Any] = {"use_cache": False} if kind == "decoder" else {}

    def inputs(length: int, batch: int) -> dict[str, Any]:
        return {name: padded(length, batch)[name] for name in names} | fixed

    shapes = {name: {0: BATCH, 1: LENGTH} for name in names} | dict.fromkeys(fixed)
    program = torch.export.export(variant, (), inputs(9, 2), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for length, batch in ((9, 2), (14, 3), (5, 1)):
        given = inputs(length, batch)
        assert (loaded(**given)[0] - variant(**given)[0]).abs().max() < LOGITS


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@torch.no_grad()
def test_onnx(tmp_path: Path) -> None:
    """An encoder runs in onnxruntime, with lengths and padding that the exporter has not seen."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    variant = attach(encoder(), ExpressiveConfig(scale="learned"))
    torch.nn.init.normal_(variant.encoder.layer[0].attention.self.mechanism.gain.log_gain)
    shapes = {name: {0: BATCH, 1: LENGTH} for name in ("input_ids", "attention_mask")}
    path = tmp_path / "encoder.onnx"
    torch.onnx.export(variant, (), path, kwargs=padded(9), dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for length, batch in ((9, 2), (14, 3), (5, 1)):
        inputs = padded(length, batch)
        given = {name: value.numpy() for name, value in inputs.items()}
        out = torch.from_numpy(session.run(None, given)[0])
        expected = variant(**inputs).last_hidden_state
        # A hidden position attends to what it sees, but nobody reads it.
        seen = inputs["attention_mask"].bool()
        assert (out - expected)[seen].abs().max() < LOGITS
