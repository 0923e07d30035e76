"""The specification: dense, in float32 or wider, differentiated by autograd.

Memory is O(Q·N). Every other implementation is tested against this file run in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import keep_mask
from .problem import HIDDEN, AttentionProblem


def visible_keys(problem: AttentionProblem) -> Tensor:
    """Which key each query sees, bool, broadcastable to (B, H, Q, N)."""
    num_queries, num_keys = problem.query.shape[2], problem.key.shape[2]
    device = problem.query.device
    index = torch.arange(num_keys, device=device)
    start, end = problem.static_bounds(torch.arange(num_queries, device=device))
    visible = ((index >= start[:, None]) & (index < end[:, None]))[None, None]
    if problem.ranges is not None:
        visible = visible & problem.ranges.dense(num_keys)
    if problem.mask is not None:
        visible = visible & problem.mask
    if problem.bias is not None:
        visible = visible & (problem.bias > HIDDEN)
    return visible


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Dense evaluation of the family.

    Returns:
        out: (B, H, Q, E) in the dtype of the query.
        log_normalizer: log(exp(sink) + Σ w), (B, H, Q), −inf for a row that sees nothing.
        weights: normalised weights after dropout, (B, H, Q, N), in the compute dtype.
    """
    dtype, group = problem.compute_dtype, problem.group
    query = problem.query.to(dtype)
    key = problem.key.to(dtype).repeat_interleave(group, dim=1)
    value = problem.value.to(dtype).repeat_interleave(group, dim=1)

    score = torch.matmul(query, key.transpose(-1, -2)) * problem.scale
    if problem.gain is not None:
        score = score * problem.gain.to(dtype)[:, None, None]
    if problem.softcap is not None:
        score = problem.softcap * torch.tanh(score / problem.softcap)

    visible = visible_keys(problem).expand(score.shape)
    additive = torch.zeros((), dtype=dtype, device=score.device).expand(score.shape)
    if problem.key_bias is not None:
        key_bias = problem.key_bias.to(dtype).repeat_interleave(group, dim=1)
        additive = additive + key_bias[:, :, None, :]
    if problem.bias is not None:
        additive = additive + problem.bias.to(dtype)
    if not problem.response.bounded:
        additive, score = additive + score, torch.zeros_like(score)

    # A shift of all log-weights of a row, the sink's included, cancels in the quotient.
    hidden = additive.detach().masked_fill(~visible, -torch.inf)
    # The extra column gives a row without any key a maximum.
    shift = torch.nn.functional.pad(hidden, (0, 1), value=-torch.inf).amax(dim=-1, keepdim=True)
    if problem.sinks is not None:
        sinks = problem.sinks.to(dtype)[..., None]
        shift = torch.maximum(shift, sinks.detach())
    shift = torch.where(shift.isfinite(), shift, 0.0)

    weight = problem.response(score) * torch.exp(torch.where(visible, additive - shift, 0.0))
    weight = torch.where(visible, weight, 0.0)
    normalizer = weight.sum(dim=-1, keepdim=True)
    if problem.sinks is not None:
        normalizer = normalizer + torch.exp(sinks - shift)
    empty = normalizer < torch.finfo(dtype).tiny
    weight = torch.where(empty, 0.0, weight / torch.where(empty, 1.0, normalizer))
    log_normalizer = torch.where(
        empty, -torch.inf, torch.log(normalizer.clamp_min(torch.finfo(dtype).tiny)) + shift
    )

    if problem.dropout > 0.0:
        assert problem.seed is not None
        batch, heads, num_queries, num_keys = weight.shape
        arange = lambda n: torch.arange(n, device=weight.device)  # noqa: E731
        head = arange(batch * heads).view(batch, heads, 1, 1)
        keep = keep_mask(
            problem.seed, head, arange(num_queries)[:, None], arange(num_keys), problem.dropout
        )
        weight = torch.where(keep, weight / (1.0 - problem.dropout), 0.0)

    out = torch.matmul(weight, value)
    return out.to(problem.query.dtype), log_normalizer.squeeze(-1), weight
