"""Attention as tensor functions, usable without Transformers."""

from .functional import expressive_attention
from .problem import KeyRanges

__all__ = ["KeyRanges", "expressive_attention"]
