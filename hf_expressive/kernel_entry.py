"""Expressive attention as a kernel of the Hub: `attn_implementation="owner/name"`.

A kernel repository carries this file as the `__init__.py` beside a copy of `ops`, so it needs nothing
but torch, and Triton on a GPU. Transformers hands such a kernel the masks of its sdpa implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .ops import KeyRanges, expressive_attention

__all__ = ["expressive_attention", "flash_attn_forward", "supports_flash_attn"]

#: Keywords that would change the attention and that this kernel cannot honour.
_REFUSED = ("block_indices", "block_table", "cache", "head_mask", "indices")
_PACKAGE = 'install the package instead, pip install hf-expressive, and use "expressive".'


def supports_flash_attn() -> bool:
    """Tells Transformers that `flash_attn_forward` has the signature of an attention function."""
    return True


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Weights z²ⁿ / (1 + z²ⁿ), row-normalised, under the contract of Transformers' attention functions.

    Scale and power n come from the `hf_expressive` section of the model's config; without one they are
    the module's own scaling and 1.

    Args:
        query: (batch, heads, query, dim).
        key, value: (batch, key/value heads, keys, dim).
        attention_mask: bool (true is visible), additive float, or `None` for the triangle where the
            module is causal and there is more than one query, aligned with the first key.

    Returns:
        (batch, query, heads, dim), and no weights.

    Raises:
        ValueError: the config asks for what needs the package (learned gains, hybrids, another
            mechanism), or a keyword cannot be honoured.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"this kernel cannot honour {name}; {_PACKAGE}")
    scale, power = _options(getattr(module, "config", None))
    mask: Tensor | KeyRanges | None = attention_mask
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if causal and num_queries > 1:
            # Keys beyond the queries are those of a static cache that are not written yet.
            end = torch.arange(1, num_queries + 1, device=query.device, dtype=torch.int32)[None]
            start = torch.zeros_like(end) if sliding_window is None else end - sliding_window
            mask = KeyRanges(start.clamp(min=0), end.clamp(max=num_keys))
    elif attention_mask.shape[-1] > num_keys:
        mask = attention_mask[..., :num_keys]
    out = expressive_attention(
        query,
        key,
        value,
        scale=scaling if scale is None else scale,
        power=power,
        attention_mask=mask,
        bias=position_bias,
        softcap=softcap,
        sinks=kwargs.get("sinks") if s_aux is None else s_aux,
        dropout=dropout if module.training else 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def _options(config: Any) -> tuple[float | None, float]:
    """(scale, power) of a model's config; a scale of `None` is the module's own."""
    section = getattr(config, "hf_expressive", None)
    if section is None:
        return None, 1.0
    if not isinstance(section, Mapping) or section.get("mechanism") != "expressive":
        raise ValueError(f"this kernel runs expressive attention only; {_PACKAGE}")
    scale, power = section.get("scale", "module"), section.get("power", 1.0)
    if section.get("softmax_layers") or section.get("softmax_heads"):
        raise ValueError(f"this kernel runs no hybrids with softmax attention; {_PACKAGE}")
    # Whatever else there is, and will be, is off or has nothing to do where it has this value.
    neutral = {"sink": False, "gain": 1.0}
    read = {"mechanism", "version", "scale", "power", "softmax_layers", "softmax_heads"}
    for name, value in section.items():
        if name not in read and (name not in neutral or value != neutral[name]):
            raise ValueError(f"this kernel has no {name}={value!r}; {_PACKAGE}")
    if not (scale == "module" or isinstance(scale, int | float)):
        raise ValueError(f"this kernel has no scale={scale!r}; {_PACKAGE}")
    return (None if scale == "module" else float(scale)), float(power)
