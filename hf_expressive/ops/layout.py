"""Where the rows of a (B, heads, length, size) tensor lie in memory.

Models keep (B, length, heads, size), hand over its transpose and transpose the output back. Outputs and
gradients therefore take the order of the tensor that they belong to: transposing them back is no copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_interleaved(rows: Tensor) -> bool:
    """Whether the heads of one position lie beside each other, not the positions of one head."""
    return rows.stride(1) < rows.stride(2)


def empty_rows(like: Tensor, size: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, heads, length, size) tensor without gaps, in the order of `like`.

    Args:
        like: (B, heads, length, any size), any strides.
        dtype: that of `like` unless given.
    """
    batch, heads, length, _ = like.shape
    inner = (size, heads * size) if is_interleaved(like) else (length * size, size)
    strides = (heads * length * size, *inner, 1)
    # Not a view, which could not be written in place where it is the value of an autograd function.
    return torch.empty_strided(
        (batch, heads, length, size), strides, dtype=dtype or like.dtype, device=like.device
    )


def in_order_of(like: Tensor, rows: Tensor) -> Tensor:
    """`rows`, or a copy of them in the order that `empty_rows` gives."""
    packed = rows.transpose(1, 2) if is_interleaved(like) else rows
    if packed.is_contiguous():
        return rows
    return empty_rows(like, rows.shape[3], dtype=rows.dtype).copy_(rows)
