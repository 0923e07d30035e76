"""The two `torch.library` operators behind every implementation that writes its own backward.

`torch.compile`, `torch.export` and FSDP2 see one opaque operator with a fake implementation and a
registered gradient, whichever implementation runs. The gradients of the gain and of the sinks follow
from those of the operator and are derived here, once for all implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from . import blockwise, hopper, triton
from .layout import empty_rows, in_order_of
from .operator import operator
from .problem import AttentionProblem, KeyRanges
from .response import Response


class Implementation(Protocol):
    """A module that evaluates a problem and its gradients without autograd."""

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        problem: AttentionProblem,
        out: Tensor,
        log_normalizer: Tensor,
        grad_out: Tensor,
        *,
        need_key_bias: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]: ...


IMPLEMENTATIONS: dict[str, Implementation] = {
    "blockwise": blockwise,
    "triton": triton,
    "hopper": hopper,
}

_NO_WINDOW = -1
_NO_SOFTCAP = 0.0


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Scores and sums are float32 or wider by contract; autocast would round the products' operands."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def attention(problem: AttentionProblem, impl: str) -> tuple[Tensor, Tensor]:
    """Output (B, H, Q, E) and log normaliser (B, H, Q); the output is differentiable."""
    ranges = problem.ranges
    out, log_normalizer = _forward(
        problem.query,
        problem.key,
        problem.value,
        problem.gain,
        problem.key_bias,
        problem.bias,
        problem.mask,
        None if ranges is None else ranges.start,
        None if ranges is None else ranges.end,
        None if ranges is None else ranges.keys,
        problem.sinks,
        problem.seed,
        problem.response.kind,
        problem.response.power,
        problem.response.epsilon,
        problem.scale,
        problem.is_causal,
        _NO_WINDOW if problem.sliding_window is None else problem.sliding_window,
        _NO_SOFTCAP if problem.softcap is None else problem.softcap,
        problem.dropout,
        impl,
    )
    return out, log_normalizer


_response = cache(Response)


def _problem(arguments: Sequence[Any]) -> AttentionProblem:
    """The inverse of the flattening in `attention`."""
    (query, key, value, gain, key_bias, bias, mask, start, end, keys, sinks, seed) = arguments[:12]
    (kind, power, epsilon, scale, is_causal, window, softcap, dropout) = arguments[12:20]
    return AttentionProblem(
        query=query,
        key=key,
        value=value,
        response=_response(kind, power, epsilon),
        scale=scale,
        gain=gain,
        key_bias=key_bias,
        bias=bias,
        mask=mask,
        ranges=None if start is None else KeyRanges(start, end, keys),
        is_causal=is_causal,
        sliding_window=None if window == _NO_WINDOW else window,
        softcap=None if softcap == _NO_SOFTCAP else softcap,
        sinks=sinks,
        dropout=dropout,
        seed=seed,
    )


def _compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gain: Tensor | None,
    key_bias: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    keys: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    kind: str,
    power: float,
    epsilon: float,
    scale: float,
    is_causal: bool,
    sliding_window: int,
    softcap: float,
    dropout: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    arguments = (
        *(query, key, value, gain, key_bias, bias, mask, start, end, keys, sinks, seed),
        *(kind, power, epsilon, scale, is_causal, sliding_window, softcap, dropout),
    )
    with without_autocast(query):
        out, log_normalizer = IMPLEMENTATIONS[impl].forward(_problem(arguments))
    return in_order_of(query, out), log_normalizer


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Any:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_rows(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=dtype)


def _compute_backward(
    grad_out: Tensor,
    out: Tensor,
    log_normalizer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gain: Tensor | None,
    key_bias: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    keys: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    kind: str,
    power: float,
    epsilon: float,
    scale: float,
    is_causal: bool,
    sliding_window: int,
    softcap: float,
    dropout: float,
    impl: str,
    need_key_bias: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        *(query, key, value, gain, key_bias, bias, mask, start, end, keys, sinks, seed),
        *(kind, power, epsilon, scale, is_causal, sliding_window, softcap, dropout),
    )
    with without_autocast(query):
        grads = IMPLEMENTATIONS[impl].backward(
            _problem(arguments),
            out,
            log_normalizer,
            grad_out,
            need_key_bias=need_key_bias,
            need_bias=need_bias,
        )
    grad_query, grad_key, grad_value, grad_key_bias, grad_bias = grads
    # An operator returns tensors only; an unwanted gradient travels as an empty one.
    return (
        in_order_of(query, grad_query),
        in_order_of(key, grad_key),
        in_order_of(value, grad_value),
        query.new_empty(0) if grad_key_bias is None else grad_key_bias.contiguous(),
        query.new_empty(0) if grad_bias is None else grad_bias.contiguous(),
    )


def _backward_fake(
    grad_out: Tensor,
    out: Tensor,
    log_normalizer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gain: Tensor | None,
    key_bias: Any,
    bias: Any,
    *arguments: Any,
) -> Any:
    need_key_bias, need_bias = arguments[-2:]
    wanted = (key_bias if need_key_bias else None, bias if need_bias else None)
    return (
        *(empty_rows(rows, rows.shape[3]) for rows in (query, key, value)),
        *(
            query.new_empty(0)
            if tensor is None
            else torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor in wanted
        ),
    )


_backward = operator("attention_backward", _compute_backward, _backward_fake)


def _gradients(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, log_normalizer = ctx.saved_tensors
    query, gain, sinks = tensors[0], tensors[3], tensors[10]
    needs = ctx.needs_input_grad
    grad_query, grad_key, grad_value, grad_key_bias, grad_bias = _backward(
        grad_out, out, log_normalizer, *tensors, *ctx.options, needs[4], needs[5]
    )
    grad_gain = grad_sinks = None
    if needs[3]:
        # q_i · dq_i = gain Σ_j (dz_ij/dgain) dL/dz_ij, so no pass over the scores is needed.
        product = (query.to(gain.dtype) * grad_query.to(gain.dtype)).sum(dim=(0, 2, 3))
        grad_gain = product / gain
        if ctx.options[0] != "exp":
            # A gain of 0 makes every score 0, where a squared response is flat.
            grad_gain = torch.where(gain == 0, 0.0, grad_gain)
    if needs[10]:
        delta = (grad_out.to(log_normalizer.dtype) * out.to(log_normalizer.dtype)).sum(dim=-1)
        share = torch.exp(sinks.to(log_normalizer.dtype) - log_normalizer)
        share = torch.where(log_normalizer.isneginf(), 0.0, share)
        grad_sinks = (-share * delta).sum_to_size(sinks.shape).to(sinks.dtype)
    return (
        *(grad_query, grad_key, grad_value, grad_gain),
        grad_key_bias if needs[4] else None,
        grad_bias if needs[5] else None,
        *(None, None, None, None, grad_sinks, None),
    )


_forward = operator(
    "attention_forward", _compute, _forward_fake, gradients=_gradients, saves_output=True
)
