"""Plugin for vLLM: models with expressive attention under the names of their checkpoints.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its
processes. It enters the native decoder models once more, under the `architectures` of a saved variant.
Such a model is vLLM's own with `backend.ExpressiveBackend` in every layer; what cannot run that way is
refused while the model is built. With another version of vLLM than the one that this is written for
nothing is entered, and vLLM refuses variants as unknown architectures.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

from ..checkpoint import PREFIX

#: The plugin's interfaces change from one of these to the next.
SUPPORTED = "0.33"


def register() -> None:
    """Enters backend and models into vLLM's registries; idempotent, initialises no device."""
    installed = version("vllm")
    if not installed.startswith(f"{SUPPORTED}."):
        # An error here would stop vLLM for every model, not just for variants.
        logging.getLogger(__name__).warning(
            "hf_expressive serves variants with vLLM %s, not with the installed %s.",
            SUPPORTED,
            installed,
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.backend.ExpressiveBackend")
    for name in list(ModelRegistry.get_supported_archs()):
        decoder = name.endswith("ForCausalLM") and not name.startswith(PREFIX)
        # vLLM adapts its configuration to some architectures by their names, which ours are not.
        if decoder and name not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(PREFIX + name, f"{__name__}.models:{PREFIX}{name}")
