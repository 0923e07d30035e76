"""The response g: how a score becomes a weight.

hill    g(z) = z²ⁿ / (1 + z²ⁿ)     expressive attention (n = power, the Hill exponent)
square  g(z) = z² + ε              implicit kernel attention
exp     g(z) = exp(z)              softmax attention, for hybrids, the RBF kernel and comparison
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ResponseKind = Literal["hill", "square", "exp"]


@dataclass(frozen=True, slots=True)
class Response:
    """One response function; the compile-time choice of every implementation.

    Args:
        kind: `"hill"`, `"square"` or `"exp"`.
        power: the Hill exponent n > 0; read by `"hill"` only.
        epsilon: the constant ε ≥ 0; read by `"square"` only.
    """

    kind: ResponseKind
    power: float = 1.0
    epsilon: float = 0.0

    @property
    def bounded(self) -> bool:
        """Whether g needs no running maximum of its own (only `"exp"` does)."""
        return self.kind != "exp"

    def limit(self, dtype: torch.dtype) -> float:
        """The |z| to which a Hill response clamps its scores, so that neither z² nor z²ⁿ overflows.

        10^(18/n) in float32, 10^(150/n) in float64, where the response is 1 and its slope 0 to the
        last bit; for n < 1 the power is not divided by n, because z² is taken first.
        """
        return 10.0 ** ((150.0 if dtype == torch.float64 else 18.0) / max(self.power, 1.0))

    def __call__(self, score: Tensor) -> Tensor:
        """g(z), differentiable by autograd. `"exp"` expects a score shifted by its row maximum."""
        if self.kind == "exp":
            return score.exp()
        if self.kind == "square":
            return score.square() + self.epsilon
        limit = self.limit(score.dtype)
        squared = score.clamp(-limit, limit).square()
        if self.power == 1.0:
            return squared / (1.0 + squared)
        # pow has an infinite slope at 0 for n < 1; the weight there is 0 and the gradient is set to 0.
        zero = squared == 0
        raised = torch.where(zero, 1.0, squared).pow(self.power)
        return torch.where(zero, 0.0, raised / (1.0 + raised))

    def slope(self, score: Tensor) -> Tensor:
        """dg/dz in closed form, for implementations that write their own backward."""
        if self.kind == "exp":
            return score.exp()
        if self.kind == "square":
            return 2.0 * score
        limit = self.limit(score.dtype)
        inside = score.abs() <= limit
        clamped = score.clamp(-limit, limit)
        squared = clamped.square()
        if self.power == 1.0:
            rest = 1.0 / (1.0 + squared)
            return torch.where(inside, 2.0 * clamped * rest * rest, 0.0)
        zero = squared == 0
        raised = torch.where(zero, 1.0, squared).pow(self.power)
        rest = 1.0 / (1.0 + raised)
        slope = 2.0 * self.power * raised * rest * rest / torch.where(zero, 1.0, clamped)
        return torch.where(inside & ~zero, slope, 0.0)

    def __post_init__(self) -> None:
        if self.kind not in ("hill", "square", "exp"):
            raise ValueError(f"response kind must be 'hill', 'square' or 'exp', got {self.kind!r}.")
        if not 0.0 < self.power < math.inf:
            raise ValueError(f"power must be a positive number, got {self.power!r}.")
        if not 0.0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a number ≥ 0, got {self.epsilon!r}.")
