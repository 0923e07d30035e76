"""Spectral features fused with their projection: one pass over queries or keys, forward and backward.

With t = factor · x W_s in cycles and a row of the output split into cosines and sines,

    φ(x) = [Σ_s cos 2πt_s ; Σ_s sin 2πt_s] / (S √M)

the projection never reaches memory: the forward pass reads x and writes φ, the backward pass reads x
and dφ, projects again and writes dx; a second kernel leaves a part of dW for every run of positions, and
the parts are added afterwards, so that gradients are the same in every run.

Letters: B batch, H heads of x, K heads of the frequencies (H = K · group), N positions, D head size,
S densities, M frequencies a density.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operator import operator
from . import INSTALLED

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_SIZE = 256


def unsupported(x: Tensor, frequencies: Tensor) -> str | None:
    """One sentence why the fused kernels cannot make features of `x`, or `None` if they can."""
    if 0 in frequencies.shape:
        return "Triton kernels take no empty tensors."
    return unsupported_rows(x)


def unsupported_rows(x: Tensor) -> str | None:
    """The same of kernels that go over (batch, heads, positions, dim) tensors row by row."""
    if not INSTALLED:
        return "Triton is not installed."
    if x.dtype not in _DTYPES:
        return f"Triton kernels take float16, bfloat16 or float32 tensors, got {x.dtype}."
    if x.shape[-1] > _MAX_HEAD_SIZE:
        return f"Triton kernels take head sizes up to {_MAX_HEAD_SIZE}, got {x.shape[-1]}."
    if 0 in x.shape:
        return "Triton kernels take no empty tensors."
    if not x.is_cuda:
        from .launch import COMPILED

        if COMPILED:
            return f"Triton kernels run on a GPU, the tensor is on {x.device}."
    return None


def fused_features(x: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """`spectral_features` of factor · x in the dtype of `x`, which `unsupported` must have accepted.

    Args:
        x: (batch, heads, positions, dim), any strides.
        frequencies: (key/value heads, S, dim, M), or with a batch dimension in front; cycles per unit.
        factor: multiplies x.

    Returns:
        (batch, heads, positions, 2M), differentiable once in `x` and `frequencies`.
    """
    result: Tensor = _forward(x, batched_samples(frequencies), factor)
    return result


def batched_samples(frequencies: Tensor) -> Tensor:
    """Frequencies as the kernels take them: float32, with a batch dimension in front, 1 for all."""
    samples = frequencies.float()
    return samples[None] if samples.dim() == 4 else samples


def _compute(x: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    from .features_kernels import forward

    return forward(x, frequencies, factor)


def _forward_fake(x: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    return x.new_empty((*x.shape[:3], 2 * frequencies.shape[-1]))


def _compute_backward(
    grad: Tensor,
    x: Tensor,
    frequencies: Tensor,
    factor: float,
    need_x: bool,
    need_frequencies: bool,
) -> tuple[Tensor, Tensor]:
    from .features_kernels import backward_input, backward_samples

    # An operator returns tensors only; an unwanted gradient travels as an empty one.
    nothing = x.new_empty(0)
    return (
        backward_input(grad, x, frequencies, factor) if need_x else nothing,
        backward_samples(grad, x, frequencies, factor) if need_frequencies else nothing.float(),
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    frequencies: Tensor,
    factor: float,
    need_x: bool,
    need_frequencies: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        frequencies.new_empty(frequencies.shape if need_frequencies else (0,)),
    )


_backward = operator("features_backward", _compute_backward, _backward_fake)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    need_x, need_frequencies = ctx.needs_input_grad[:2]
    grad_x, grad_frequencies = _backward(
        grad, *ctx.saved_tensors, *ctx.options, need_x, need_frequencies
    )
    return grad_x if need_x else None, grad_frequencies if need_frequencies else None


_forward = operator("features_forward", _compute, _forward_fake, gradients=_gradients)
