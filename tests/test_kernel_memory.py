"""Memory of the kernels on the CPU, counted at torch's allocator: linear in the length."""

from __future__ import annotations

import pytest
import torch

from hf_expressive import ImplicitKernelConfig
from hf_expressive.attention.base import AttentionCall
from hf_expressive.attention.implicit_kernel import ImplicitKernelAttention

HEADS, DIM = 2, 16


def peak_bytes(kernel: str, length: int) -> int:
    """Largest number of bytes that a causal pass, forward and backward, holds at a time."""
    options = ImplicitKernelConfig(kernel=kernel, p=3.0)  # type: ignore[arg-type]
    child = ImplicitKernelAttention(options, layer=0, heads=HEADS, kv_heads=HEADS, head_dim=DIM)
    child.train().reset_parameters()
    query, key, value = torch.randn(3, 1, HEADS, length, DIM).requires_grad_().unbind()
    call = AttentionCall(query, key, value, DIM**-0.5, is_causal=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        child(call)[0].sum().backward()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kernel", ["rbf", "stationary", "direct", "implicit", "copula"])
def test_memory_is_linear_in_the_length(kernel: str) -> None:
    peak_bytes(kernel, 64)  # what is allocated once
    short, long = peak_bytes(kernel, 1024), peak_bytes(kernel, 4096)
    assert long < 4.4 * short
    # One tensor of weights would be this large.
    assert long < 0.6 * 4 * HEADS * 4096**2


def test_the_count_would_see_a_square() -> None:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        torch.ones(512, 512)
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    assert max(event.nbytes() for event in events if event.name() == "[memory]") == 4 * 512**2
