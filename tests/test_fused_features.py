"""The fused spectral features against the plain ones in float64: values, gradients, dispatch.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, needs_gpu
from tolerances import FLOOR, assert_within_budget, largest_error
from torch import Tensor

from hf_expressive.ops import implicit_kernel
from hf_expressive.ops.spectral import spectral_features
from hf_expressive.ops.triton import features, features_kernels

pytestmark = pytest.mark.usefixtures("poisoned")
FACTOR = 0.6


def plain(x: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Features as `ops.implicit_kernel` makes them without the kernels, computed in `dtype`."""
    lengths = (x.to(dtype) * FACTOR).unflatten(1, (frequencies.shape[-4], -1))
    made = spectral_features(lengths.flatten(2, 3), frequencies.to(dtype))
    return made.unflatten(2, lengths.shape[2:4]).flatten(1, 2)


# batch, heads, key/value heads, positions, dim, densities, frequencies; whether sequences have their own
SHAPES = {
    "stationary": ((1, 2, 2, 37, 16, 1, 16), False),
    "direct, grouped": ((2, 4, 2, 150, 24, 2, 20), False),
    "of each sequence": ((2, 2, 1, 33, 5, 2, 40), True),
}


def draw(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (batch, heads, kv_heads, positions, dim, densities, count), own = SHAPES[name]
    x = torch.randn(batch, positions, heads, dim, device=DEVICE).transpose(1, 2).to(dtype)
    lead = (batch,) if own else ()
    return x, torch.randn(*lead, kv_heads, densities, dim, count, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "run"),
    [("stationary", 16), ("direct, grouped", 16), ("direct, grouped", 1), ("of each sequence", 16)],
)
def test_values_and_gradients(
    name: str, dtype: torch.dtype, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_kernels, "_RUN", run)
    x, frequencies = draw(name, dtype)
    assert features.unsupported(x, frequencies) is None
    grad = torch.randn(*x.shape[:3], 2 * frequencies.shape[-1], device=DEVICE).to(dtype)
    results = []
    for precision in (None, torch.float64, torch.float32):
        leaves = x.detach().requires_grad_(), frequencies.detach().requires_grad_()
        if precision is None:
            out = features.fused_features(*leaves, FACTOR)
            assert out.dtype == dtype
        elif precision == torch.float64:
            leaves = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
            out = plain(*leaves, precision)
        else:
            out = plain(*leaves, precision).to(dtype)
        gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        results.append([out.detach(), *gradients])
    for what, fused, exact, rough in zip(("out", "dx", "dW"), *results, strict=True):
        unit = max(1.0, float(exact.abs().max()))
        if what == "dW" and dtype != torch.float32:
            # Float32 of half-precision operands: held to the rounding of those.
            assert largest_error(fused / unit, exact / unit) < FLOOR[dtype] / 10
        else:
            assert_within_budget(fused / unit, exact / unit, rough / unit, what)


def test_many_turns_keep_their_phase() -> None:
    x = torch.full((1, 1, 1, 16), 1000.0, device=DEVICE)
    frequencies = torch.full((1, 1, 16, 16), 0.25, device=DEVICE)
    out = features.fused_features(x, frequencies, 1.0)  # 4000 turns
    assert largest_error(out[..., :16], torch.full_like(out[..., :16], 0.25)) < 1e-6
    assert largest_error(out[..., 16:], torch.zeros_like(out[..., 16:])) < 1e-6


def test_a_wrong_phase_is_caught() -> None:
    x, frequencies = draw("stationary", torch.float32)
    exact = plain(x, frequencies, torch.float64)
    wrong = features.fused_features(x, frequencies, FACTOR * 1.001)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(wrong, exact, plain(x, frequencies, torch.float32))


def test_unsupported_says_why() -> None:
    x, frequencies = draw("stationary", torch.float32)
    for changed, reason in ((x.double(), "float64"), (x[:, :, :0], "empty")):
        said = features.unsupported(changed, frequencies)
        assert said is not None
        assert reason in said
    wide = torch.zeros(1, 1, 1, 300, device=DEVICE)
    assert "300" in str(features.unsupported(wide, frequencies))


def test_traced_shapes_are_those_of_the_kernels() -> None:
    x, frequencies = draw("direct, grouped", torch.float32)
    torch.library.opcheck(
        torch.ops.hf_expressive.features_forward.default,
        (x.requires_grad_(), frequencies[None].requires_grad_(), FACTOR),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@needs_gpu
def test_implicit_kernel_attention_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = features.fused_features
    monkeypatch.setattr(
        features, "fused_features", lambda *args: calls.append(args) or original(*args)
    )
    x, frequencies = draw("direct, grouped", torch.bfloat16)
    implicit_kernel.kernel_features(x, frequencies, 0.25)
    assert len(calls) == 1
