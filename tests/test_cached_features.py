"""Features of cached keys on a GPU: whatever happens to a cache, they are those of its keys.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import threading

import pytest
import torch
from kernel_device import DEVICE, needs_gpu
from torch import Tensor

from hf_expressive.attention.key_memory import KeyMemory
from hf_expressive.ops.triton import features_kernels
from hf_expressive.ops.triton.features import fused_features
from hf_expressive.ops.triton.magnitude import fused_magnitude

pytestmark = pytest.mark.usefixtures("poisoned")
FACTORS = {"factor": 0.6, "magnitude_factor": 0.3}


def draw(batch: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, 2, length, 16, generator=generator).to(DEVICE, torch.bfloat16)


def samples(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 2, 16, 8, generator=generator).to(DEVICE)


def assert_current(
    memory: KeyMemory, key: Tensor, frequencies: Tensor, p: float | Tensor, factor: float = 0.6
) -> None:
    """What the memory says of the keys is what is made of them afresh."""
    options = {**FACTORS, "factor": factor}
    found = memory.features(key, frequencies, p, **options)
    wanted = fused_features(key, frequencies, factor), fused_magnitude(key, p, 0.3)
    for ours, fresh in zip(found, wanted, strict=True):
        assert ours.shape == fresh.shape
        assert torch.equal(ours, fresh)


@pytest.mark.parametrize("seed", range(3))
def test_a_long_history_of_calls_is_never_wrong(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory, frequencies = KeyMemory(), samples(generator)
    p: float | Tensor = torch.tensor([2.5, 3.0], device=DEVICE) if seed else 3.0
    keys = draw(2, 60, generator)
    for step in range(24):
        kind = int(torch.randint(8, (), generator=generator))
        if kind < 3:
            keys = torch.cat([keys, draw(2, 1 + 3 * kind, generator)], dim=2)
        elif kind == 3:  # beams
            keys = keys[torch.randint(2, (2,), generator=generator).to(DEVICE)]
        elif kind == 4:
            keys = keys[:, :, : 20 + keys.shape[2] // 2]
        elif kind == 5:
            keys = keys.clone()
            keys[:, 1, -1:] = draw(2, 1, generator)[:, 0]
        elif kind == 6 and isinstance(p, Tensor):
            p = p + 0.25
        else:
            frequencies = frequencies.clone()
            frequencies[1, 0, 3, 2] += 1.0
        assert_current(memory, keys, frequencies, p, factor=0.6 if step % 7 else 0.7)


def test_shapes_and_dtypes_may_change() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, frequencies = KeyMemory(), samples(generator)
    for batch, dtype in ((2, torch.bfloat16), (3, torch.bfloat16), (3, torch.float32)):
        assert_current(memory, draw(batch, 30, generator).to(dtype), frequencies, 2.0)
    assert_current(memory, draw(3, 30, generator), samples(generator)[..., :4], 2.0)
    per_sequence = torch.stack([samples(generator) for _ in range(3)])
    assert_current(memory, draw(3, 30, generator), per_sequence, 2.0)


def test_only_spans_with_new_keys_are_made_again() -> None:
    """What was made of the others is left alone, here seen by a mark put on it."""
    generator = torch.Generator().manual_seed(0)
    memory, frequencies = KeyMemory(), samples(generator)
    keys = draw(1, 3 * features_kernels.SPAN - 5, generator)
    features, magnitudes = memory.features(keys, frequencies, 3.0, **FACTORS)
    features.fill_(7.0)
    magnitudes.fill_(7.0)
    longer = torch.cat([keys, draw(1, 1, generator)], dim=2)
    features, magnitudes = memory.features(longer, frequencies, 3.0, **FACTORS)
    old = 2 * features_kernels.SPAN
    assert (features[:, :, :old] == 7.0).all()
    assert (magnitudes[:, :, :old] == 7.0).all()
    assert torch.equal(features[:, :, old:], fused_features(longer[:, :, old:], frequencies, 0.6))
    assert (magnitudes[:, :, old:] != 7.0).all()


def test_what_was_cropped_away_is_not_known_under_other_frequencies() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, frequencies, keys = KeyMemory(), samples(generator), draw(1, 200, generator)
    assert_current(memory, keys, frequencies, 3.0)
    frequencies = frequencies + 0.1
    assert_current(memory, keys[:, :, :50], frequencies, 3.0)
    assert_current(memory, keys, frequencies, 3.0)


def test_an_interrupted_step_leaves_nothing_half_made(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    memory, frequencies, keys = KeyMemory(), samples(generator), draw(1, 30, generator)
    assert_current(memory, keys[:, :, :29], frequencies, 3.0)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features_kernels, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            memory.features(keys, frequencies, 3.0, **FACTORS)
    assert_current(memory, keys, frequencies, 3.0)


def test_memory_of_inference_mode_serves_outside_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, frequencies, keys = KeyMemory(), samples(generator), draw(1, 90, generator)
    p = torch.tensor([2.5, 3.0], device=DEVICE)
    for length, mode in ((30, torch.inference_mode), (31, torch.no_grad), (90, torch.no_grad)):
        with mode():
            assert_current(memory, keys[:, :, :length], frequencies, p)


def test_a_thread_writes_nothing_that_another_may_be_reading() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, frequencies = KeyMemory(), samples(generator)
    mine, others = draw(1, 30, generator), draw(1, 31, generator)
    found = memory.features(mine, frequencies, 3.0, **FACTORS)
    before = [tensor.clone() for tensor in found]
    thread = threading.Thread(target=assert_current, args=(memory, others, frequencies, 3.0))
    thread.start()
    thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, before, strict=True))
    assert_current(memory, mine, frequencies, 3.0)


@needs_gpu
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_without_memory(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from hf_expressive import ImplicitKernelConfig
    from hf_expressive.attention.implicit_kernel import SpectralKernel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=60, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel="direct", p="learned"),
    )
    model = model.to(DEVICE).eval()
    options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = [torch.randint(60, (2, 9), device=DEVICE) for _ in range(2)]
    calls: list[int] = []
    original = KeyMemory.features
    monkeypatch.setattr(
        KeyMemory,
        "features",
        lambda self, key, *args, **kw: (
            calls.append(key.shape[2]) or original(self, key, *args, **kw)
        ),
    )

    def generate() -> list[Tensor]:
        return [model.generate(ids, num_beams=beams, **options) for ids in prompts]

    ours = generate()
    assert len(calls) == 2 * 2 * 79
    monkeypatch.setattr(SpectralKernel, "_decodes", lambda self, call: False)
    assert all(torch.equal(*pair) for pair in zip(ours, generate(), strict=True))
