"""Stand-ins for parts that need libraries this project does not use (timm image backbones)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class PyramidConfig(PreTrainedConfig):
    """A convolutional pyramid: feature maps at strides 4, 8, 16 … with the given numbers of channels."""

    model_type = "test_pyramid"

    def __init__(self, channels: tuple[int, ...] = (16, 16, 32, 64), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels


class PyramidModel(PreTrainedModel):
    config_class = PyramidConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        sizes = (3, *config.channels)
        strides = (4, *(2 for _ in config.channels[1:]))
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, stride, stride)
            for before, after, stride in zip(sizes[:-1], sizes[1:], strides, strict=True)
        )
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """(batch, 3, height, width) -> for each stage (batch, channels, height / s, width / s)."""
        maps = []
        for stage in self.stages:
            pixel_values = torch.tanh(stage(pixel_values))
            maps.append(pixel_values)
        return BaseModelOutput(last_hidden_state=maps)  # type: ignore[arg-type]


AutoConfig.register(PyramidConfig.model_type, PyramidConfig, exist_ok=True)
AutoModel.register(PyramidConfig, PyramidModel, exist_ok=True)
