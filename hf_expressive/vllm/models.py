"""vLLM's decoder models with expressive attention; each class is made when it is asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm import ModelRegistry
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..checkpoint import PREFIX
from .backend import ExpressiveBackend, options_of_model


@cache
def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = ModelRegistry._try_load_model_cls(name.removeprefix(PREFIX))
    if stock is None:
        raise AttributeError(f"vLLM has no model class {name.removeprefix(PREFIX)}.")
    return variant_of(stock, name)


def variant_of(stock: type, name: str) -> type:
    """A model class of vLLM with our backend in every attention layer."""

    class Variant(stock):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            options_of_model(vllm_config)  # refuses before anything is built
            vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            check_layers(vllm_config)

    Variant.__name__ = Variant.__qualname__ = name
    return Variant


def check_layers(vllm_config: Any) -> None:
    """Raises ValueError if a layer that keeps a cache does not run our backend."""
    layers = vllm_config.compilation_config.static_forward_context
    for name, layer in layers.items():
        # Layers of other kinds, experts for example, are in this table as well.
        if (
            isinstance(layer, AttentionLayerBase)
            and layer.get_attn_backend() is not ExpressiveBackend
        ):
            raise ValueError(
                f"{name} ({type(layer).__name__}) does not run expressive attention; this architecture "
                "cannot be served as a variant."
            )
