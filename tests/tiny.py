"""Tiny models for tests that need a model, any model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

VOCABULARY = 32
#: Of a decoder of two layers and four heads in groups of two.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Scores of order one, so that what attention does shows in the logits.
    "initializer_range": 0.5,
}


def llama_config(**options: Any) -> LlamaConfig:
    """Two layers, four heads in groups of two."""
    return LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **options})


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**options)).eval()


def bert_config(**options: Any) -> BertConfig:
    """Two layers, four heads."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.5,
        **options,
    )


def llava(**options: Any) -> LlavaForConditionalGeneration:
    """A vision tower of three layers and a language model of two."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=llama_config(),
        image_token_index=VOCABULARY - 1,
        image_seq_length=4,
        **options,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def tokens(length: int = 9, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY - 2, (batch, length), generator=generator)


def llava_inputs() -> dict[str, Tensor]:
    ids = tokens()
    ids[:, 1:5] = VOCABULARY - 1
    generator = torch.Generator().manual_seed(4)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """The logits of a model on fixed inputs."""
    if not inputs:
        inputs = {"input_ids": tokens()}
    return model(**inputs).logits


@torch.no_grad()
def train_gains(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gives every learned gain a value of its own and returns them by name."""
    gains = {name: value for name, value in model.named_parameters() if "log_gain" in name}
    assert gains
    generator = torch.Generator().manual_seed(5)
    for value in gains.values():
        value.copy_(torch.randn(value.shape, generator=generator))
    return {name: value.clone() for name, value in gains.items()}
