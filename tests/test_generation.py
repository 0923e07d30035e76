"""Generation where the keys lie elsewhere: compiled static caches, and the paged cache of batches."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny import SIZES, llama, llava, tokens
from tolerances import LOGITS
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from hf_expressive import ExpressiveConfig, ImplicitKernelConfig, attach, hooks
from hf_expressive.masking import paged_ranges

NEW = 6
_SIZES: dict[str, Any] = {**SIZES, "head_dim": 4, "pad_token_id": 0}
_GPT_OSS = {"sliding_window": 3, "num_local_experts": 2, "num_experts_per_tok": 1}
_DIRECT = ImplicitKernelConfig(kernel="direct", num_features=8)
MODELS: dict[str, Any] = {
    "llama": lambda: attach(llama(), ExpressiveConfig(scale="learned")),
    "llama, direct": lambda: attach(llama(), _DIRECT),
    "mistral, sliding": lambda: attach(
        MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=3)), ExpressiveConfig()
    ),
    "gemma2, sliding and capped": lambda: attach(
        Gemma2ForCausalLM(Gemma2Config(**_SIZES, sliding_window=3)), ExpressiveConfig()
    ),
    "gpt_oss, sinks": lambda: attach(
        GptOssForCausalLM(GptOssConfig(**_SIZES, **_GPT_OSS)), ExpressiveConfig()
    ),
}


def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


# ---- static cache, compiled -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "padded", "graphs"),
    # Transformers counts the tokens of a sliding cache in Python: a second graph takes any count.
    [
        ("llama", False, 1),
        ("llama", True, 1),
        ("llama, direct", True, 1),
        ("mistral, sliding", True, 2),
    ],
)
def test_compiled_decoding_with_a_static_cache(name: str, padded: bool, graphs: int) -> None:
    """One compiled step serves every position, exactly."""
    variant = model(name)
    prompt, rest = tokens(7), tokens(7 + NEW)[:, 7:]
    mask = torch.ones(2, 7 + NEW, dtype=torch.long)
    mask[0, : 3 if padded else 0] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    whole = torch.cat([prompt, rest], dim=1)
    options = {"attention_mask": mask} if padded else {}
    expected = variant(whole, position_ids=positions, use_cache=False, **options).logits

    cache = StaticCache(variant.config, max_cache_len=32)
    options = {"attention_mask": mask[:, :7]} if padded else {}
    variant(prompt, position_ids=positions[:, :7], past_key_values=cache, **options)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(variant, fullgraph=True, backend=counter)
    full = torch.zeros(2, 32, dtype=torch.long)
    for place in range(7, 7 + NEW):
        # A static cache wants one shape of mask for all steps.
        full[:, : place + 1] = mask[:, : place + 1]
        options = {"attention_mask": full.clone()} if padded else {}
        out = step(
            whole[:, place : place + 1].clone(),
            position_ids=positions[:, place : place + 1].clone(),
            past_key_values=cache,
            **options,
        ).logits
        assert (out[:, 0] - expected[:, place]).abs().max() < LOGITS * expected.abs().max()
    assert counter.frame_count == graphs


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_lengths_share_a_graph(padded: bool) -> None:
    """Eight lengths take the two graphs that any model takes: the first, and one for all lengths."""
    variant = model("llama")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(variant, fullgraph=True, backend=counter)
    for length in (5, 9, 12, 7, 17, 23, 31, 8):
        options: dict[str, Any] = {"input_ids": tokens(length), "use_cache": False}
        if padded:
            options["attention_mask"] = torch.ones(2, length, dtype=torch.long)
            options["attention_mask"][0, : length // 3] = 0
        difference = compiled(**options).logits - variant(**options).logits
        assert difference.abs().max() < LOGITS
    assert counter.frame_count == 2


# ---- continuous batching --------------------------------------------------------------------------

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 4, 3, 2], [12], [20, 21, 5, 5, 6]]
_PAGED = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters
needs_paged = pytest.mark.skipif(not _PAGED, reason="refused with this version of Transformers")


def _config() -> GenerationConfig:
    # No end of sequence: every request gets all of its tokens.
    return GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)


def batch(variant: PreTrainedModel, max_batch_tokens: int) -> list[list[int]]:
    # By default the cache takes most of the machine's memory.
    sizes = ContinuousBatchingConfig(
        page_size=4, num_blocks=64, max_batch_tokens=max_batch_tokens, max_requests_per_batch=4
    )
    out = variant.generate_batch(  # type: ignore[operator]
        PROMPTS, generation_config=_config(), continuous_batching_config=sizes
    )
    return [out[key].generated_tokens for key in sorted(out)]


def alone(variant: PreTrainedModel) -> list[list[int]]:
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = variant.generate(ids, generation_config=_config(), attention_mask=ids * 0 + 1)  # type: ignore[operator]
        rows.append(out[0, len(prompt) :].tolist())
    return rows


@needs_paged
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_requests_alone(
    name: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continuous batching gives each request what it gets alone; flash attention is never swapped in."""
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: True)
    variant = model(name)
    asked = variant.config._attn_implementation
    expected = alone(variant)
    # Few tokens at once: the longer prompts are read in several parts.
    assert batch(variant, max_batch_tokens=5 if chunked else 64) == expected
    assert variant.config._attn_implementation == asked


@needs_paged
def test_a_part_that_would_be_switched_is_refused() -> None:
    """Continuous batching switches whole models: a tower's mechanism would be lost."""
    composite = llava()
    attach(composite.model.vision_tower, ExpressiveConfig())
    with pytest.raises(ValueError, match="continuous batching would switch the whole model"):
        composite.init_continuous_batching()


def test_older_paged_caches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        def update(self, key_states: Any, value_states: Any, read_index: Any) -> None: ...

    monkeypatch.setattr(hooks, "PagedAttentionCache", Older)
    with pytest.raises(ValueError, match=r"from Transformers 5\.23 on"):
        model("llama").init_continuous_batching()


@pytest.mark.parametrize("window", [None, 2])
def test_paged_ranges(window: int | None) -> None:
    """Two requests, one in the middle of its prompt, one decoding; the last query belongs to nobody."""
    queries, keys = torch.tensor([0, 3, 4, 4]), torch.tensor([0, 5, 11, 11])
    visible = paged_ranges(queries, keys, 5, window).dense(11)[0, 0]
    expected = torch.zeros(5, 11, dtype=torch.bool)
    for query, (start, end) in enumerate([(0, 3), (0, 4), (0, 5), (5, 11)]):
        expected[query, start if window is None else max(start, end - window) : end] = True
    assert torch.equal(visible, expected)
