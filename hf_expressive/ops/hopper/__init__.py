"""Kernels for Hopper GPUs (compute capability 9.0): the cases that training spends its time on.

Expressive attention of power 1 and 2, in bfloat16 and float16, and the square response of implicit
kernel attention with a bias a key, in bfloat16; with causality, sliding window, padding, packed
sequences, grouped heads, learned gain and sinks, for head sizes 64 and 128. Written in Gluon
(`tiled_forward`, `tiled_backward`; what both use is in `work` and `operations`). Deterministic: which
program computes a tile varies, what it computes does not.

Gradients in bfloat16 come from a backward kernel of five products; those in float16 and of short calls
from the portable kernels (`has_own_backward`).
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache

import torch
from torch import Tensor

from .. import triton as portable
from ..problem import AttentionProblem

_HEAD_SIZES = (64, 128)
#: Pairs of queries and keys from which on these kernels are taken, by the kind of the response.
_LEAST_PAIRS = {"hill": 2**27, "square": 2**28}


def unsupported(problem: AttentionProblem) -> str | None:
    """One sentence why these kernels cannot run `problem`, or `None` if they can."""
    query, value, response = problem.query, problem.value, problem.response
    if not query.is_cuda:
        return f"the Hopper kernels run on a GPU, the tensors are on {query.device}."
    if (reason := _unsuitable(query.device)) is not None:
        return reason
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper kernels take bfloat16 or float16 tensors, got {query.dtype}."
    sizes = f"{query.shape[-1]} and {value.shape[-1]}"
    if query.shape[-1] not in _HEAD_SIZES or value.shape[-1] not in _HEAD_SIZES:
        return f"the Hopper kernels take head sizes of 64 or 128, got {sizes}."
    if response.kind == "square":
        if query.dtype == torch.float16:
            return (
                "the Hopper kernels compute square responses, which outgrow float16, in bfloat16."
            )
    elif response.kind != "hill" or response.power not in (1.0, 2.0):
        return (
            "the Hopper kernels compute Hill responses of power 1 and 2 and square responses, "
            f"got {response}."
        )
    elif value.shape[-1] != query.shape[-1]:
        return f"the Hopper kernels take equal head sizes with Hill responses, got {sizes}."
    elif problem.key_bias is not None:
        return "the Hopper kernels take key_bias with square responses only."
    for name in ("bias", "mask", "softcap"):
        if getattr(problem, name) is not None:
            return f"the Hopper kernels take no {name}."
    if problem.dropout > 0.0:
        return "the Hopper kernels have no dropout."
    if query.shape[2] * problem.group <= portable.DECODE_ROWS:
        return (
            "a call with few queries is a decoding step, which the portable kernels split by keys."
        )
    return portable.unsupported(problem)


def is_faster(problem: AttentionProblem) -> bool:
    """Whether these kernels are worth their launch, for which the host describes every tensor.

    Pairs of queries and keys are counted over all batches and heads, within the sliding window. From
    2²⁷ on the Hill response took 0.71 to 0.95 of the portable kernels' time, and no more than theirs
    with a slow host's launches (Triton 3.6, H200, `recipes/results/hopper.json`). From 2²⁴ to 2²⁶ a
    forward pass takes 0.9 to 1.3 of it, with half of the keys padded 1.1 to 1.4, and waits for the
    host anyway. The square response was compared from 2²⁸ on.
    """
    batch, heads, num_queries, _ = problem.query.shape
    seen = problem.key.shape[2]
    if problem.sliding_window is not None:
        seen = min(seen, problem.sliding_window)
    return batch * heads * num_queries * seen >= _LEAST_PAIRS.get(problem.response.kind, math.inf)


@torch.compiler.assume_constant_result
def _unsuitable(device: torch.device) -> str | None:
    """One sentence why a GPU or the installed Triton cannot run these kernels, or `None`."""
    if torch.version.hip is not None:  # some of these GPUs, too, call themselves 9.0
        return "the Hopper kernels are for NVIDIA GPUs."
    if not has_gluon():
        return "the Hopper kernels need Triton 3.6 or newer; `pip install -U triton`."
    if (capability := _capability(device)) != (9, 0):
        major, minor = capability
        return f"the Hopper kernels need compute capability 9.0, this GPU has {major}.{minor}."
    return None


@cache
def has_gluon() -> bool:
    """Whether the installed Triton brings Gluon for Hopper."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Attention of `problem`, which `unsupported` must have accepted.

    Returns:
        out: (B, H, Q, E), dtype and order in memory those of the query.
        log_normalizer: log(exp(sink) + Σ w), (B, H, Q), float32, −inf for a row that sees nothing.
    """
    from .launch import forward as launch

    return launch(problem)


def backward(
    problem: AttentionProblem,
    out: Tensor,
    log_normalizer: Tensor,
    grad_out: Tensor,
    *,
    need_key_bias: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients, by the portable kernels unless `has_own_backward`; see `ops.triton.backward`."""
    if has_own_backward(problem):
        from .gradient import gradients

        found = gradients(problem, out, log_normalizer, grad_out, need_key_bias=need_key_bias)
        return (*found, None)
    return portable.backward(
        problem,
        out,
        log_normalizer,
        grad_out,
        need_key_bias=need_key_bias,
        need_bias=need_bias,
    )


def has_own_backward(problem: AttentionProblem) -> bool:
    """Whether `gradient` covers a call, and `is_faster`.

    In float16 gradients of tiny scores would overflow before they are multiplied by the keys.
    """
    return problem.query.dtype == torch.bfloat16 and is_faster(problem)
