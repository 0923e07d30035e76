"""Fused Triton kernels of the family: forward, backward and split-key decoding in O(N) memory.

Deterministic, without atomic operations and without host synchronisation. With `TRITON_INTERPRET=1`
they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..problem import AttentionProblem

#: Up to this many queries, times the query heads that share a key/value head, a call is a decoding
#: step: its keys are split over programs instead of its queries.
DECODE_ROWS = 64
# Looked up once: `torch.compile` cannot follow the search.
INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_SIZE = 256


def unsupported(problem: AttentionProblem) -> str | None:
    """One sentence why these kernels cannot run `problem`, or `None` if they can."""
    query, value = problem.query, problem.value
    if not INSTALLED:
        return "Triton is not installed; `pip install triton` or choose another implementation."
    if query.dtype not in _DTYPES:
        return f"Triton kernels take float16, bfloat16 or float32 tensors, got {query.dtype}."
    if max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_SIZE:
        sizes = f"{query.shape[-1]} and {value.shape[-1]}"
        return f"Triton kernels take head sizes up to {_MAX_HEAD_SIZE}, got {sizes}."
    if 0 in query.shape or 0 in problem.key.shape or 0 in value.shape:
        shapes = f"query {tuple(query.shape)} and value {tuple(value.shape)}"
        return f"Triton kernels take no empty tensors, got {shapes}."
    if not query.is_cuda:
        from .launch import COMPILED

        if COMPILED:
            return (
                f"Triton kernels run on a GPU, the tensors are on {query.device} "
                "(TRITON_INTERPRET=1, set before Triton is imported, interprets them)."
            )
    return None


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Attention of `problem`, which `unsupported` must have accepted.

    Returns:
        out: (B, H, Q, E) in the dtype of the query; its order in memory, too, where there is more to
            compute than a decoding step.
        log_normalizer: log(exp(sink) + Σ w), (B, H, Q), float32, −inf for a row that sees nothing.
    """
    if problem.query.shape[2] * problem.group <= DECODE_ROWS:
        from .decode import decode

        return decode(problem)
    from .tiled_forward import forward as tiled

    return tiled(problem)


def backward(
    problem: AttentionProblem,
    out: Tensor,
    log_normalizer: Tensor,
    grad_out: Tensor,
    *,
    need_key_bias: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and, where needed, of `key_bias` and `bias`, in their shapes.

    Args:
        problem: as given to `forward`.
        out: (B, H, Q, E), what `forward` returned.
        log_normalizer: (B, H, Q), what `forward` returned.
        grad_out: gradient of `out`, (B, H, Q, E), any strides.
    """
    from .backward_bias import bias_gradient
    from .backward_key import key_gradients
    from .backward_query import query_gradient
    from .gradient import prepare
    from .launch import Call

    prepared = prepare(Call(problem), out, log_normalizer, grad_out)
    grad_key, grad_value, grad_key_bias = key_gradients(prepared, need_key_bias=need_key_bias)
    grad_bias = bias_gradient(prepared) if need_bias else None
    return query_gradient(prepared), grad_key, grad_value, grad_key_bias, grad_bias
