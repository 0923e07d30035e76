"""The forward kernel with the portable gradients: what `impl="auto"` takes on a Hopper GPU."""

from __future__ import annotations

from ..triton import backward
from . import forward

__all__ = ["backward", "forward"]
