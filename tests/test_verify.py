"""`verify` passes on sound models and catches each way of breaking a mechanism."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GptOssConfig,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

import hf_expressive
from hf_expressive import ExpressiveConfig
from hf_expressive.attention import contract
from hf_expressive.attention.base import AttentionCall, Mechanism
from hf_expressive.ops import KeyRanges
from hf_expressive.verify import VerificationError, verify

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 90,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=2, **_SIZES)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="expressive", hf_expressive=ExpressiveConfig(**options)
    )


def _outcomes(error: pytest.ExceptionInfo[VerificationError]) -> dict[str, str]:
    """Name of each check → its state, read from the printed report."""
    lines = str(error.value).splitlines()[1:]
    names = ["every layer ran", "exact", "finite", "no future leak"]
    names += ["padded = unpadded", "cached = uncached", "packed = separate"]
    return {name: line.split()[0] for line in lines for name in names if f" {name} " in line}


@pytest.mark.parametrize("options", [{}, {"scale": "learned", "power": 2.0}, {"softmax_heads": 2}])
def test_sound_llama_passes_every_check(options: dict[str, Any]) -> None:
    report = verify(_llama(**options))
    assert [check.passed for check in report.checks] == [True] * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_passes(dtype: torch.dtype) -> None:
    assert verify(_llama().to(dtype)).passed


def test_other_families_pass_what_applies() -> None:
    torch.manual_seed(0)
    t5 = T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=90)
    vit_sizes = {name: _SIZES[name] for name in list(_SIZES)[:4]}
    vit = ViTConfig(image_size=24, patch_size=8, **vit_sizes)
    built = {
        "bert": AutoModel.from_config(BertConfig(**_SIZES), attn_implementation="expressive"),
        "t5": AutoModelForSeq2SeqLM.from_config(t5, attn_implementation="expressive"),
        "vit": AutoModel.from_config(vit, attn_implementation="expressive"),
    }
    passed = {
        name: {check.name for check in verify(model).checks if check.passed}
        for name, model in built.items()
    }
    assert passed["bert"] == {"every layer ran", "exact", "finite", "padded = unpadded"}
    assert passed["t5"] == passed["bert"] | {"no future leak", "cached = uncached"}
    assert passed["vit"] == {"every layer ran", "exact", "finite"}


def test_packing_by_lengths_where_positions_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=5,
        **_SIZES,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="expressive")

    def packed() -> str:
        check = {check.name: check for check in verify(model).checks}["packed = separate"]
        assert check.passed
        return check.detail

    assert "position_ids" in packed()
    monkeypatch.setattr(contract, "packed_rows", lambda position_ids: None)
    assert "only with cu_seq_lens_q" in packed()


def test_mode_and_random_state_are_kept() -> None:
    model = _llama()
    model.train()
    state = torch.get_rng_state()
    verify(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_mechanism_is_refused() -> None:
    model = hf_expressive.detach(_llama())
    with pytest.raises(ValueError, match="runs no mechanism"):
        verify(model)


def _break(monkeypatch: pytest.MonkeyPatch, change: Any) -> VerificationError:
    """Runs `verify` with every call changed on its way from Transformers to the mechanism."""
    read = contract.read_call

    def changed(*args: Any, **kwargs: Any) -> AttentionCall:
        return change(read(*args, **kwargs))

    monkeypatch.setattr("hf_expressive.registry.read_call", changed)
    with pytest.raises(VerificationError) as error:
        verify(_llama())
    return error  # type: ignore[return-value]


def test_dropped_causality_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(call: AttentionCall) -> AttentionCall:
        return dataclasses.replace(call, is_causal=False)

    assert _outcomes(_break(monkeypatch, change))["no future leak"] == "FAILED"


def test_ignored_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(call: AttentionCall) -> AttentionCall:
        mask = call.attention_mask
        if not isinstance(mask, KeyRanges):
            return call
        bare = KeyRanges(torch.zeros_like(mask.start), mask.end, None)
        return dataclasses.replace(call, attention_mask=bare)

    assert _outcomes(_break(monkeypatch, change))["padded = unpadded"] == "FAILED"


def test_a_mask_added_to_the_score_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(self: Any, call: AttentionCall, heads: slice) -> Any:
        score = call.query @ call.key.repeat_interleave(2, dim=1).transpose(-1, -2) * call.scaling
        visible = torch.ones(score.shape[-2:], dtype=torch.bool)
        if isinstance(call.attention_mask, KeyRanges):
            visible = call.attention_mask.dense(score.shape[-1])
        elif call.is_causal:
            visible = visible.tril()
        score = score + torch.where(visible, 0.0, -1e4)
        weight = score.square() / (1 + score.square())
        weight = weight / weight.sum(dim=-1, keepdim=True)
        return weight @ call.value.repeat_interleave(2, dim=1), None

    monkeypatch.setattr("hf_expressive.attention.expressive.ExpressiveAttention.evaluate", evaluate)
    with pytest.raises(VerificationError) as error:
        verify(_llama())
    outcomes = _outcomes(error)
    assert outcomes["no future leak"] == outcomes["padded = unpadded"] == "FAILED"


def test_an_inexact_implementation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = AttentionCall.attend

    def inexact(self: AttentionCall, *args: Any, **kwargs: Any) -> Any:
        out, weights = attend(self, *args, **kwargs)
        return (out * 1.01 if self.impl == "auto" else out), weights

    monkeypatch.setattr(AttentionCall, "attend", inexact)
    with pytest.raises(VerificationError) as error:
        verify(_llama())
    assert _outcomes(error)["exact"] == "FAILED"


def test_a_layer_that_does_not_run_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama()
    layer = model.model.layers[1]
    monkeypatch.setattr(
        layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None)
    )
    with pytest.raises(VerificationError) as error:
        verify(model)
    assert _outcomes(error)["every layer ran"] == "FAILED"
    assert "model.layers.1.self_attn" in str(error.value)


def test_a_cache_that_is_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Mechanism.forward

    def forgetful(self: Mechanism, call: AttentionCall) -> Any:
        if call.query.shape[2] == 1:
            call = dataclasses.replace(call, key=call.key[:, :, -1:], value=call.value[:, :, -1:])
        return forward(self, call)

    monkeypatch.setattr(Mechanism, "forward", forgetful)
    with pytest.raises(VerificationError) as error:
        verify(_llama())
    assert _outcomes(error)["cached = uncached"] == "FAILED"


def test_packing_that_is_ignored_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(call: AttentionCall) -> AttentionCall:
        if call.query.shape[0] == 1 and isinstance(call.attention_mask, KeyRanges):
            return dataclasses.replace(call, attention_mask=None, is_causal=True)
        return call

    assert _outcomes(_break(monkeypatch, change))["packed = separate"] == "FAILED"


def test_an_overflow_in_float16_is_named() -> None:
    model = _llama().half()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(3e4)
    with pytest.raises(VerificationError, match=r"overflowed before attention; use bfloat16"):
        verify(model)
