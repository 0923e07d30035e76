"""Counter-based dropout: which normalised weights are kept depends on (seed, batch, head, i, j) only.

Every implementation draws the same mask from the same seed, whatever its tiling, and the backward
pass draws it again instead of storing it. The generator is a 32-bit integer hash (two multiplications,
three xor-shifts) applied to the row and then to the column.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
COLUMN_FACTOR = 0x9E3779B1
MIX_FACTOR_1 = 0x7FEB352D
MIX_FACTOR_2 = 0x846CA68B


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * MIX_FACTOR_1) & _LOW
    x = x ^ (x >> 15)
    x = (x * MIX_FACTOR_2) & _LOW
    return x ^ (x >> 16)


def threshold(dropout: float) -> int:
    """Weights whose hash is below this 32-bit value are dropped."""
    return min(int(dropout * 2.0**32), _LOW)


def keep_mask(seed: Tensor, head: Tensor, row: Tensor, column: Tensor, dropout: float) -> Tensor:
    """True where the weight is kept; the arguments broadcast against each other.

    Args:
        seed: int64, (1,), 0 ≤ seed < 2³².
        head: int64, batch · num_heads + head. row: query index. column: key index.
        dropout: probability of a false.
    """
    row_hash = _mix(_mix(head ^ seed) ^ row)
    return _mix(row_hash ^ ((column * COLUMN_FACTOR) & _LOW)) >= threshold(dropout)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator: repeated when a checkpointed block is recomputed."""
    return torch.randint(0, 2**32, (1,), device=device, dtype=torch.int64)
