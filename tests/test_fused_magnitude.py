"""The fused magnitudes against the plain ones in float64: values, gradients, dispatch.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, needs_gpu
from tolerances import assert_within_budget
from torch import Tensor

from hf_expressive.ops import implicit_kernel
from hf_expressive.ops.spectral import squared_norm
from hf_expressive.ops.triton import magnitude

pytestmark = pytest.mark.usefixtures("poisoned")
FACTOR = 0.3

# batch, heads, positions, dim
SHAPES = {"one key": (1, 2, 1, 16), "odd": (2, 3, 77, 20), "long rows": (1, 1, 9, 256)}


def exponents_of(kind: str, heads: int, dtype: torch.dtype) -> float | Tensor:
    if kind == "learned":
        return torch.linspace(1.0, 4.5, heads, device=DEVICE, dtype=dtype).requires_grad_()
    return float(kind)


def evaluate(
    x: Tensor, kind: str, grad: Tensor, dtype: torch.dtype, *, fused: bool
) -> list[Tensor]:
    """Magnitudes and the gradients of x and, if learned, of p, computed in `dtype`."""
    leaf = x.detach().to(x.dtype if fused else dtype).requires_grad_()
    p = exponents_of(kind, x.shape[1], dtype)
    out = magnitude.fused_magnitude(leaf, p, FACTOR) if fused else squared_norm(leaf, p) * FACTOR
    leaves = [leaf, p] if isinstance(p, Tensor) else [leaf]
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return [out.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["1", "1.5", "2", "3", "learned"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name: str, kind: str, dtype: torch.dtype) -> None:
    batch, heads, positions, dim = SHAPES[name]
    # Heads and positions swapped in memory, as models hand them over.
    x = torch.randn(batch, positions, heads, dim, device=DEVICE).transpose(1, 2).to(dtype)
    x[..., 0] = 0.0  # a single zero, where |x|^p has no second derivative
    x[:, :, -1, -1] = 20.0  # one entry far above the others
    x[0, 0, 0] = 0.0  # a key of length zero
    grad = torch.randn(batch, heads, positions, device=DEVICE)
    assert magnitude.unsupported(x) is None
    found = evaluate(x, kind, grad, torch.float32, fused=True)
    exact = evaluate(x, kind, grad, torch.float64, fused=False)
    rough = evaluate(x, kind, grad, torch.float32, fused=False)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    rough[1] = rough[1].to(dtype)
    for what, a, b, c in zip(("out", "dx", "dp"), found, exact, rough, strict=False):
        # Relative to the key's own gradient, or to the number itself.
        unit = (b.abs().amax(dim=-1, keepdim=True) if what == "dx" else b.abs()).clamp(min=1.0)
        assert_within_budget((a / unit).to(a.dtype), b / unit, (c / unit).to(c.dtype), what)
    assert (found[0][0, 0, 0] == 0).all()
    assert (found[1][0, 0, 0] == 0).all()


def test_a_wrong_exponent_is_caught() -> None:
    x = torch.randn(1, 2, 40, 16, device=DEVICE)
    exact, rough = (squared_norm(x.to(dtype), 3.0) for dtype in (torch.float64, torch.float32))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(magnitude.fused_magnitude(x, 3.001, 1.0), exact, rough)


def test_lengths_beyond_the_square_root_of_the_range() -> None:
    x = torch.full((1, 1, 2, 16), 1e15, device=DEVICE)
    x[:, :, 1] = 1e-15
    found = magnitude.fused_magnitude(x, 3.0, 1.0)
    torch.testing.assert_close(found, squared_norm(x.double(), 3.0).float())


@pytest.mark.parametrize("kind", ["1", "1.5", "3"])
def test_gradient_of_an_entry_that_vanishes_beside_another(kind: str) -> None:
    x = torch.zeros(1, 1, 1, 16, device=DEVICE)
    x[..., 0], x[..., 1] = 30.0, -1e-44
    grad = torch.ones(1, 1, 1, device=DEVICE)
    found = evaluate(x, kind, grad, torch.float32, fused=True)[1]
    exact = evaluate(x, kind, grad, torch.float64, fused=False)[1]
    torch.testing.assert_close(found.double(), exact, atol=1e-12, rtol=1e-6)


def test_traced_shapes_are_those_of_the_kernels() -> None:
    x = torch.randn(2, 5, 3, 16, device=DEVICE).transpose(1, 2).requires_grad_()
    p = torch.tensor([1.0, 2.0, 3.0], device=DEVICE).requires_grad_()
    torch.library.opcheck(
        torch.ops.hf_expressive.magnitude_forward.default,
        (x, p, 0.0, FACTOR),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@needs_gpu
def test_implicit_kernel_attention_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = magnitude.fused_magnitude
    monkeypatch.setattr(
        magnitude, "fused_magnitude", lambda *args: calls.append(args) or original(*args)
    )
    key = torch.randn(1, 2, 8, 16, device=DEVICE, dtype=torch.bfloat16)
    implicit_kernel.log_magnitude(key, 3.0, 0.25)
    assert len(calls) == 1
