"""Attention as tensor functions, usable without Transformers."""

from .functional import expressive_attention
from .implicit_kernel import implicit_kernel_attention
from .problem import KeyRanges

__all__ = ["KeyRanges", "expressive_attention", "implicit_kernel_attention"]
