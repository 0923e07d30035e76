"""One table of tolerances, and the plain attention that the budgets are measured against.

The rule: the error of an implementation against a float64 reference may be twice the error of a
plain PyTorch implementation of the same formula in the same dtype, plus a tiny absolute floor a dtype
(for values of order one). Nothing in this file imports the package under test.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Absolute floor of the budget: about one rounding of a number of order one.
FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}
#: Largest difference between two logits of float32 models that compute the same thing.
LOGITS = 1e-4
#: Largest difference between float64 results that differ only in the order of summation.
SAME_IN_FLOAT64 = 1e-11
#: Error of the implementation over the error of the plain one.
FACTOR = 2.0


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64; infinite if anything in `actual` is not finite."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not actual.isfinite().all():
        return float("inf")
    return float((actual.double() - expected.double()).abs().max()) if actual.numel() else 0.0


def assert_within_budget(actual: Tensor, expected: Tensor, plain: Tensor, name: str = "") -> None:
    """Asserts the rule of this module.

    Args:
        actual: result of the implementation, in the dtype under test.
        expected: the same in float64.
        plain: result of the plain implementation in the dtype under test.
        name: what is compared, for the message.
    """
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype} is not {plain.dtype}"
    budget = FACTOR * largest_error(plain, expected) + FLOOR[actual.dtype]
    error = largest_error(actual, expected)
    assert error <= budget, f"{name}: error {error:.3g} exceeds the budget {budget:.3g}"


def plain_response(score: Tensor, kind: str, power: float = 1.0, epsilon: float = 0.0) -> Tensor:
    """The response g of a score, as the formula says."""
    if kind == "square":
        return score**2 + epsilon
    raised = score.abs() ** (2.0 * power) if power != 1.0 else score * score
    return raised / (1.0 + raised)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor,
    kind: str = "hill",
    power: float = 1.0,
    epsilon: float = 0.0,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The formula of the family, written densely in the dtype of `query`.

    Args:
        query: (batch, heads, query, dim). key, value: (batch, key/value heads, keys, …).
        scale: number or (heads,).
        kind: `"hill"`, `"square"` or `"exp"`.
        visible: bool, broadcastable to (batch, heads, query, keys).
        bias: additive log-weight, broadcastable to (batch, heads, query, keys).
        key_bias: (batch, key/value heads, keys).
        sinks: (heads,) or (batch, heads, query, 1).
        keep: which normalised weights dropout keeps, (batch, heads, query, keys).
        dropout: its probability.
    """
    dtype, group = query.dtype, query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    factor = scale[:, None, None].to(dtype) if isinstance(scale, Tensor) else scale
    score = query @ key.mT * factor
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    additive = torch.zeros_like(score)
    if bias is not None:
        additive = additive + bias.to(dtype)
    if key_bias is not None:
        additive = additive + key_bias.to(dtype).repeat_interleave(group, dim=1)[:, :, None]
    if visible is not None:
        additive = additive.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sinks = (sinks[:, None, None] if sinks.dim() == 1 else sinks).to(dtype)
    if kind == "exp":
        additive, response = additive + score, torch.ones_like(score)
    else:
        response = plain_response(score, kind, power, epsilon)
    shift = additive.detach().amax(dim=-1, keepdim=True)
    shift = shift if sinks is None else torch.maximum(shift, sinks.detach())
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    weight = response * torch.exp(additive - shift)
    total = weight.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - shift)
    weight = weight / total.masked_fill(total == 0, 1.0)
    if keep is not None:
        weight = weight * keep / (1.0 - dropout)
    return weight @ value
