"""What one attention call computes, apart from how: the argument of every implementation.

    z_ij = gain_h · scale · q_i·k_j                (softcap: z ← cap · tanh(z / cap))
    w_ij = g(z_ij) · exp(key_bias_j + bias_ij) · visible_ij
    out_i = Σ_j w_ij v_j / (exp(sink_i) + Σ_j w_ij)

Letters: B batch, H query heads, K key/value heads (H = K · group), Q queries, N keys,
D query/key size, E value size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .response import Response

#: An additive log-weight at or below this hides the key: its weight is exactly 0. exp(-9000) is 0 in
#: every float format, so only rows that see nothing else notice; it covers -inf, the minimum of every
#: dtype and the -1e4 that some models use (-9984 after rounding to bfloat16).
HIDDEN = -9000.0


@dataclass(frozen=True, slots=True)
class KeyRanges:
    """A visibility pattern in O(N) memory: query i sees key j iff start_i ≤ j < end_i and keys_j.

    Causal, sliding-window, chunked, packed and padded batches are all of this form.

    Args:
        start: first visible key of each query, int32, (B or 1, Q).
        end: one past the last visible key, int32, (B or 1, Q). `end <= start` hides every key.
        keys: further restriction a key (padding), bool, (B or 1, N), or `None`.
    """

    start: Tensor
    end: Tensor
    keys: Tensor | None = None

    def dense(self, num_keys: int) -> Tensor:
        """The same pattern as a bool tensor (B or 1, 1, Q, N), O(Q·N) memory."""
        index = torch.arange(num_keys, device=self.start.device)
        visible = (index >= self.start[..., None]) & (index < self.end[..., None])
        if self.keys is not None:
            visible = visible & self.keys[:, None, :]
        return visible[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """Tensors and options of one attention call, validated and normalised by `ops.functional`.

    Args:
        query: (B, H, Q, D). key: (B, K, N, D). value: (B, K, N, E). Any strides; one dtype.
        response: g.
        scale: multiplies q·k.
        gain: learned factor a head, (H,), float32 or wider, or `None`.
        key_bias: additive log-weight a key, (B, K, N), float32 or wider, or `None`.
        bias: additive log-weight, each dimension of (B, H, Q, N) or 1, or `None`. Values at or below
            `HIDDEN` hide the key.
        mask: bool, each dimension of (B, H, Q, N) or 1, true where visible, or `None`.
        ranges: `KeyRanges`, or `None`.
        is_causal: query i sees key j iff j ≤ i + N − Q (the last query is aligned with the last key).
        sliding_window: with `is_causal`, only the last `sliding_window` visible keys (itself counted);
            without, the keys with |i + N − Q − j| < `sliding_window`.
        softcap: cap of the score, or `None`.
        sinks: log-weight of the sink, each dimension of (B, H, Q) or 1, or `None`.
        dropout: probability of dropping a normalised weight.
        seed: int64, (1,), on the device of `query`; required if `dropout` > 0.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    response: Response
    scale: float
    gain: Tensor | None = None
    key_bias: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    ranges: KeyRanges | None = None
    is_causal: bool = False
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = field(default=None)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 for every other dtype."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def static_bounds(self, query_index: Tensor) -> tuple[Tensor, Tensor]:
        """[start, end) of the keys that `is_causal` and `sliding_window` leave to each query, int64."""
        num_keys = self.key.shape[2]
        diagonal = query_index + (num_keys - self.query.shape[2])
        start = torch.zeros_like(diagonal)
        end = torch.full_like(diagonal, num_keys)
        if self.is_causal:
            end = (diagonal + 1).clamp(0, num_keys)
        if self.sliding_window is not None:
            start = (diagonal - self.sliding_window + 1).clamp(min=0)
            if not self.is_causal:
                end = (diagonal + self.sliding_window).clamp(0, num_keys)
        return start, end
