"""The vLLM plugin under vLLM's own classes and registries; no engine is started."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_expressive.vllm
from hf_expressive import ExpressiveConfig, ImplicitKernelConfig
from hf_expressive.config import MechanismConfig
from hf_expressive.ops import expressive_attention

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; it needs a torch of its own", allow_module_level=True)

from vllm import ModelRegistry
from vllm.config import vllm as vllm_config_module
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from hf_expressive.vllm import register
from hf_expressive.vllm.backend import ExpressiveBackend, options_of_model
from hf_expressive.vllm.models import check_layers, variant_of

BLOCK, BLOCKS, KV_HEADS, HEADS, DIM = 4, 32, 2, 4, 8


def config(options: MechanismConfig | None = None) -> Any:
    section = None if options is None else options.to_dict()
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(hf_expressive=section)),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        attention_config=SimpleNamespace(backend=None),
        compilation_config=SimpleNamespace(static_forward_context={}),
        speculative_config=None,
    )


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The configuration that vLLM's layers see while they are built."""
    made = config(ExpressiveConfig(scale=0.7, power=2.0))
    monkeypatch.setattr(vllm_config_module, "_current_vllm_config", made)
    return made


def layer(**options: Any) -> Any:
    arguments = {
        "num_heads": HEADS,
        "head_size": DIM,
        "scale": DIM**-0.5,
        "num_kv_heads": KV_HEADS,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
    }
    return ExpressiveBackend.get_impl_cls()(**{**arguments, **options})


class Requests:
    """Sequences that grow step by step in a paged cache whose blocks are in disorder."""

    def __init__(self, count: int) -> None:
        self.inputs = [torch.randn(3, 20, HEADS, DIM) for _ in range(count)]
        self.done = [0] * count
        order = torch.randperm(BLOCKS)
        self.tables = order[: count * 6].reshape(count, 6).int()
        self.cache = torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * DIM)

    def step(self, attention: Any, new: list[int], pad: int = 0) -> list[Tensor]:
        """Each request goes on by some tokens; returns their outputs, (tokens, heads, dim)."""
        active = [i for i, tokens in enumerate(new) if tokens]
        parts = [self.inputs[i][:, self.done[i] : self.done[i] + new[i]] for i in active]
        slots = []
        for i in active:
            positions = torch.arange(self.done[i], self.done[i] + new[i])
            slots.append(self.tables[i][positions // BLOCK] * BLOCK + positions % BLOCK)
            self.done[i] += new[i]
        counts = [new[i] for i in active]
        tokens = sum(counts)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([self.done[i] for i in active], dtype=torch.int32),
            num_reqs=len(active),
            num_actual_tokens=tokens,
            max_query_len=max(counts),
            max_seq_len=max(self.done),
            block_table_tensor=self.tables[active],
            slot_mapping=torch.cat([*slots, torch.full((pad,), -1)]).long(),
        )
        spec = SimpleNamespace(block_size=BLOCK)
        builder = ExpressiveBackend.get_builder_cls()(spec, [], config(), torch.device("cpu"))
        query, key, value = torch.nn.functional.pad(torch.cat(parts, dim=1), (0, 0, 0, 0, 0, pad))
        output = torch.full((tokens + pad, HEADS, DIM), torch.nan)
        metadata = builder.build(0, common)
        attention.forward(
            None, query, key[:, :KV_HEADS], value[:, :KV_HEADS], self.cache, metadata, output
        )
        return list(output[:tokens].split(counts))

    def expected(self, request: int, **options: Any) -> Tensor:
        query, key, value = self.inputs[request].transpose(1, 2)[:, None]
        key, value = key[:, :KV_HEADS], value[:, :KV_HEADS]
        out = expressive_attention(query, key, value, is_causal=True, **options)
        return out[0].transpose(0, 1)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"sliding_window": 5}, {"sliding_window": 5}),
        ({"logits_soft_cap": 0.5}, {"softcap": 0.5}),
        ({"sinks": torch.linspace(-1, 1, HEADS)}, {"sinks": torch.linspace(-1, 1, HEADS)}),
    ],
    ids=["plain", "window", "softcap", "sinks"],
)
@pytest.mark.usefixtures("current")
def test_steps_give_what_one_pass_gives(given: dict[str, Any], options: dict[str, Any]) -> None:
    """Prefill whole and in chunks, decoding, both in one step, requests that join and pause."""
    requests, attention = Requests(3), layer(**given)
    steps = [[7, 3, 0], [1, 5, 0], [1, 1, 11], [0, 1, 1], [2, 0, 1]]
    outputs: list[list[Tensor]] = [[], [], []]
    for number, new in enumerate(steps):
        found = requests.step(attention, new, pad=number % 3)
        for request in (i for i, tokens in enumerate(new) if tokens):
            outputs[request].append(found.pop(0))
    for request, parts in enumerate(outputs):
        together = torch.cat(parts)
        expected = requests.expected(request, scale=0.7, power=2.0, **options)
        torch.testing.assert_close(together, expected[: len(together)], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("current")
def test_profiling_run() -> None:
    output = torch.full((3, HEADS, DIM), torch.nan)
    query = torch.randn(3, HEADS, DIM)
    layer().forward(None, query, query, query, torch.tensor([]), None, output)
    assert (output == 0).all()


@pytest.mark.parametrize(
    "refused",
    [
        {"alibi_slopes": [0.5] * HEADS},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"kv_cache_dtype": "fp8"},
        {"kv_sharing_target_layer_name": "layers.0"},
    ],
    ids=lambda value: next(iter(value)),
)
@pytest.mark.usefixtures("current")
def test_what_a_layer_cannot_run_is_refused(refused: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"does not run {next(iter(refused))}"):
        layer(**refused)


@pytest.mark.parametrize(
    "options",
    [
        ExpressiveConfig(scale="learned"),
        ExpressiveConfig(softmax_layers=(0,)),
        ExpressiveConfig(softmax_heads=2),
        ImplicitKernelConfig(),
    ],
    ids=lambda options: str(options)[:40],
)
def test_what_the_plugin_cannot_run_is_refused(options: MechanismConfig) -> None:
    with pytest.raises(ValueError, match="the vLLM plugin runs expressive attention with"):
        options_of_model(config(options))


def model_config(implementation: str) -> Any:
    return SimpleNamespace(
        model_impl=implementation,
        hf_config=SimpleNamespace(auto_map=None),
        convert_type="none",
        runner_type="generate",
    )


@pytest.mark.parametrize("implementation", ["auto", "vllm", "transformers"])
def test_without_the_plugin_vllm_refuses(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though this package is imported here, and vLLM has the model: not as softmax, in no way."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    assert "LlamaForCausalLM" in ModelRegistry.models
    with pytest.raises(ValueError, match=r"HfExpressiveLlamaForCausalLM.* not (supported|a )"):
        ModelRegistry.inspect_model_cls(
            ["HfExpressiveLlamaForCausalLM"], model_config(implementation)
        )


def test_other_versions_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.setattr(hf_expressive.vllm, "version", lambda _: "0.34.0")
    with caplog.at_level("WARNING"):
        register()
    assert "not with the installed 0.34.0" in caplog.text
    assert not [name for name in ModelRegistry.models if "HfExpressive" in name]
    assert not AttentionBackendEnum.CUSTOM.is_overridden()


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    register()
    register()
    assert "HfExpressiveLlamaForCausalLM" in ModelRegistry.models
    assert not [name for name in ModelRegistry.models if name.count("HfExpressive") > 1]
    try:
        assert AttentionBackendEnum.CUSTOM.get_class() is ExpressiveBackend
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()


class Layer(AttentionLayerBase):
    def __init__(self, backend: type) -> None:
        self.backend = backend

    def get_attn_backend(self) -> Any:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        raise NotImplementedError


class Stock(torch.nn.Module):
    """A model of vLLM's shape."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        asked = vllm_config.attention_config.backend
        assert asked is AttentionBackendEnum.CUSTOM
        backend = ExpressiveBackend if prefix != "ignores the backend" else object
        layers = vllm_config.compilation_config.static_forward_context
        layers |= {"layers.0": Layer(backend), "experts": torch.nn.Module()}


def test_models_run_the_backend_or_are_refused() -> None:
    variant = variant_of(Stock, "HfExpressiveStock")
    assert variant.__name__ == "HfExpressiveStock"
    variant(vllm_config=config(ExpressiveConfig()))
    with pytest.raises(ValueError, match=r"layers\.0 .* does not run expressive attention"):
        variant(vllm_config=config(ExpressiveConfig()), prefix="ignores the backend")
    with pytest.raises(ValueError, match="the vLLM plugin runs expressive attention with"):
        variant(vllm_config=config(ImplicitKernelConfig()))
    check_layers(config())
