"""Features of cached keys: computed once, and never those of another key."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tolerances import largest_error
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from hf_expressive import ImplicitKernelConfig
from hf_expressive.attention import implicit_kernel
from hf_expressive.attention.key_memory import KeyMemory

IDS = torch.tensor([[5, 9, 22, 41, 3, 17, 8], [12, 4, 33, 50, 21, 6, 2]])
FEATURES = ["stationary", "direct", "implicit", "copula"]


class Counting:
    """A function of each key alone that counts the keys it was asked for."""

    def __init__(self) -> None:
        self.keys = 0

    def __call__(self, key: Tensor) -> tuple[Tensor, ...]:
        self.keys += key.shape[2]
        return key.sin(), key.square().sum(dim=-1)


def check(memory: KeyMemory, key: Tensor, computed: int, *given: Tensor) -> None:
    """Results are right, and the function was called for as many positions as it had to be."""
    function = Counting()
    results = memory.compute(function, key, given)
    expected = Counting()(key)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert function.keys == computed


def test_only_new_keys_are_computed() -> None:
    memory, keys = KeyMemory(), torch.randn(2, 3, 9, 4)
    check(memory, keys[:, :, :6], 6)
    check(memory, keys[:, :, :7], 1)
    check(memory, keys, 2)
    check(memory, keys, 0)
    check(memory, keys[:, :, :4], 0)
    check(memory, keys, 5)


def test_keys_written_in_place_are_seen() -> None:
    memory, static = KeyMemory(), torch.zeros(2, 3, 9, 4)
    check(memory, static, 9)
    for position in range(4):
        static[:, :, position] = torch.randn(2, 3, 4)
        check(memory, static, 1)
    static[1, 2, 5, 3] = 1.0
    check(memory, static, 1)


def test_reordered_dropped_and_foreign_keys_are_computed_again() -> None:
    memory, keys = KeyMemory(), torch.randn(2, 3, 9, 4)
    check(memory, keys, 9)
    check(memory, keys.flip(0), 9)
    half = keys.flip(0)
    half[0, :, :5] = 0.0
    check(memory, half, 5)
    check(memory, half[:1], 9)
    check(memory, half[:1].double(), 9)
    check(memory, torch.randn(1, 3, 5, 4).double(), 5)
    gap = torch.full((1, 3, 5, 4), torch.nan)
    function = Counting()
    for _ in range(2):
        memory.compute(function, gap, ())
    assert function.keys == 10
    memory.clear()
    check(memory, half[:1], 9)


def test_what_else_results_depend_on_is_compared() -> None:
    memory, keys, weight = KeyMemory(), torch.randn(2, 3, 9, 4), torch.ones(3)
    check(memory, keys, 9, weight)
    check(memory, keys, 0, weight)
    weight[0] = 2.0
    check(memory, keys, 9, weight)
    check(memory, keys, 9, weight, weight)
    check(memory, keys, 0, weight, weight)


def test_copies_are_empty() -> None:
    memory, keys = KeyMemory(), torch.randn(2, 3, 9, 4)
    check(memory, keys, 9)
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        check(twin, keys, 9)
    check(memory, keys, 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_long_history_of_calls_is_never_wrong(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory, keys, function, asked = KeyMemory(), torch.randn(2, 2, 3, 4), Counting(), 0
    for _ in range(60):
        kind = int(torch.randint(6, (), generator=generator))
        new = torch.randn(2, 2, 1 + kind, 4, generator=generator)
        if kind < 3:
            keys = torch.cat([keys, new], dim=2)
        elif kind == 3:
            keys = keys[torch.randint(2, (2,), generator=generator)]
        elif kind == 4:
            keys = keys[:, :, : 1 + keys.shape[2] // 2]
        else:
            keys[:, :, -1:] = new[:, :, :1]
        asked += keys.shape[2]
        results = memory.compute(function, keys, ())
        assert all(torch.equal(*pair) for pair in zip(results, Counting()(keys), strict=True))
    assert 0 < function.keys < 0.8 * asked


# ---- in models ------------------------------------------------------------------------------------


def _llama(kernel: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(
        config,
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel=kernel, p="learned", **options),  # type: ignore[arg-type]
    ).eval()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions whose features were computed, queries and keys, in the order of the calls."""
    positions: list[int] = []
    original = implicit_kernel.kernel_features

    def spy(x: Tensor, *arguments: Any) -> Tensor:
        positions.append(x.shape[2])
        return original(x, *arguments)

    monkeypatch.setattr(implicit_kernel, "kernel_features", spy)
    return positions


@pytest.mark.parametrize("kernel", FEATURES)
def test_a_decoding_step_computes_the_features_of_one_key(kernel: str, counted: list[int]) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    _llama(kernel).generate(IDS, **options)
    steps = [(7, 7), (8, 1), (1, 1), (1, 1)]
    assert counted == [count for step in steps for _layer in range(2) for count in step]


def test_nothing_is_kept_where_nothing_should_be(counted: list[int]) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    kept, fresh = _llama("direct"), _llama("direct", cache_features=False)
    assert torch.equal(kept.generate(IDS, **options), fresh.generate(IDS, **options))
    steps = [(7, 7), (8, 1), (1, 1), (7, 7), (1, 8), (1, 9)]
    assert sorted(counted) == sorted(
        count for step in steps for _layer in range(2) for count in step
    )


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "assisted by lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", GENERATION)
def test_generation_is_that_without_memory(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second prompt follows at once, when the first one's keys are still remembered."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = [IDS, (IDS + 7) % 60]
    if way == "assisted by lookup":
        prompts = [ids[:1].repeat(1, 2) for ids in prompts]
    model = _llama("direct")

    def generate() -> list[Tensor]:
        return [model.generate(ids, **options, **GENERATION[way]) for ids in prompts]

    ours = generate()
    monkeypatch.setattr(KeyMemory, "compute", lambda _, function, key, given: function(key))
    assert all(torch.equal(*pair) for pair in zip(ours, generate(), strict=True))
    assert not torch.equal(*ours)


def test_cross_attention_remembers_the_encoder(counted: list[int]) -> None:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=40, num_heads=4, num_layers=1, vocab_size=60, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0
    options = ImplicitKernelConfig()
    model = AutoModelForSeq2SeqLM.from_config(
        config, attn_implementation="implicit_kernel", hf_expressive=options
    ).eval()
    model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    # Encoder; then self-attention (key, query) and cross-attention (key, query) of each step.
    assert counted[:6] == [7, 7, 1, 1, 7, 1]
    assert counted[6:10] == [2, 1, 0, 1]
    assert counted[10:14] == [1, 1, 0, 1]


def test_trained_parameters_are_noticed() -> None:
    model = _llama("direct")
    with torch.no_grad():
        cache = model(IDS).past_key_values
        step = torch.tensor([[7], [7]])
        for change in ("nothing", "weight", "log_exponent"):
            for name, parameter in model.named_parameters():
                if change in name.rpartition(".")[2] and ".mechanism." in name:
                    parameter.mul_(1.5).add_(0.1)
            kept = model(step, past_key_values=copy.deepcopy(cache)).logits
            expected = copy.deepcopy(model)(step, past_key_values=copy.deepcopy(cache)).logits
            assert largest_error(kept, expected) < 1e-6, change


def test_memory_is_given_back_by_any_other_pass() -> None:
    model = _llama("direct")
    memories = [module.memory for module in model.modules() if hasattr(module, "memory")]
    for other in (model.eval, model.train):
        model.eval().generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert all(memory._kept is not None for memory in memories)
        other()(IDS)
        assert all(memory._kept is None for memory in memories)
    assert len(memories) == 2


def test_compiled_passes_leave_the_memory_alone() -> None:
    """One graph without a break, the same logits before and after decoding has filled the memory."""
    model = _llama("copula")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        for _ in range(2):
            logits = compiled(IDS, use_cache=False).logits
            assert largest_error(logits, expected) < 1e-6
            model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
