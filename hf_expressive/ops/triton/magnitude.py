"""L^p magnitudes in one pass over the keys, forward and backward.

    m(x) = factor · ‖x‖_p²

In PyTorch's own operations the same takes half a dozen passes in float32, as long as the attention
itself at a length of 4096. Letters: B batch, K heads of x, N positions, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..operator import operator
from .features import unsupported_rows as unsupported

__all__ = ["fused_magnitude", "unsupported"]


def fused_magnitude(x: Tensor, p: float | Tensor, factor: float) -> Tensor:
    """`squared_norm` of `x` times factor, float32; `unsupported` must have accepted `x`.

    Args:
        x: (batch, heads, positions, dim), any strides.
        p: exponent ≥ 1, or one a head, (heads,).
        factor: multiplies the squared norm.

    Returns:
        (batch, heads, positions), differentiable once in `x` and in a tensor `p`.
    """
    if isinstance(p, Tensor):
        result: Tensor = _forward(x, p.float(), 0.0, factor)
    else:
        result = _forward(x, None, float(p), factor)
    return result


def _compute(x: Tensor, exponents: Tensor | None, p: float, factor: float) -> Tensor:
    from .magnitude_kernels import forward

    return forward(x, exponents, p, factor)


def _forward_fake(x: Tensor, exponents: Tensor | None, p: float, factor: float) -> Tensor:
    return x.new_empty(x.shape[:3]).float()


def _compute_backward(
    grad: Tensor, x: Tensor, exponents: Tensor | None, p: float, factor: float
) -> tuple[Tensor, Tensor]:
    from .magnitude_kernels import backward

    return backward(grad, x, exponents, p, factor)


def _backward_fake(
    grad: Tensor, x: Tensor, exponents: Tensor | None, p: float, factor: float
) -> tuple[Tensor, Tensor]:
    # An operator returns tensors only; a gradient that does not exist travels as an empty one.
    return x.new_empty(x.shape), x.new_empty(0 if exponents is None else x.shape[1]).float()


_backward = operator("magnitude_backward", _compute_backward, _backward_fake)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, exponents = ctx.saved_tensors
    grad_x, grad_exponents = _backward(grad, x, exponents, *ctx.options)
    return grad_x, None if exponents is None else grad_exponents


_forward = operator("magnitude_forward", _compute, _forward_fake, gradients=_gradients)
