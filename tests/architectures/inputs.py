"""Random inputs that fit a tiny model, made from the parameter names of its `forward`."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Padding = Literal["none", "left", "right"]

BATCH = 2
TEXT = 11  # tokens of text; with placeholders for images or audio in front
TARGET = 7  # tokens of decoder input
PADDED = 3  # padded tokens in the first row
WAVE = 4000  # audio samples
FRAMES = 64  # spectrogram frames

PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "image_patch_id", "im_patch_id"),
    "audio": ("audio_token_id", "audio_token_index"),
    "video": ("video_token_id", "video_token_index"),
}


def find(config: PreTrainedConfig, *names: str) -> Any:
    """First value that is not None under any of `names`, breadth first through sub-configurations."""
    level = [config]
    while level:
        for name in names:
            for node in level:
                if (value := getattr(node, name, None)) is not None:
                    return value
        level = [
            v for node in level for v in vars(node).values() if isinstance(v, PreTrainedConfig)
        ]
    return None


def sub_config(config: PreTrainedConfig, *words: str) -> PreTrainedConfig:
    """The first sub-configuration with one of `words` in its name, else the configuration itself."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and any(word in name for word in words):
            return value
    for value in vars(config).values():
        if (
            isinstance(value, PreTrainedConfig)
            and (found := sub_config(value, *words)) is not value
        ):
            return found
    return config


def pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    return (
        (int(value[0]), int(value[-1]))
        if isinstance(value, (list, tuple))
        else (int(value), int(value))
    )


def count(features: Any, hidden: int) -> int:
    """Number of feature vectors of size `hidden` in whatever a `get_image_features` returned."""
    if isinstance(features, Tensor):
        return features.numel() // hidden
    if getattr(features, "pooler_output", None) is not None:
        return count(features.pooler_output, hidden)
    if hasattr(features, "last_hidden_state"):
        return count(features.last_hidden_state, hidden)
    return sum(count(item, hidden) for item in features)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the (decoding) text part; composite models may name two."""
    return config.get_text_config(decoder=True)


class Maker:
    """Random tensors, and the inputs that the rules make from them."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model = model
        self.config = model.config
        self.names = inspect.signature(model.forward).parameters
        self.random = torch.Generator().manual_seed(seed)
        vocabulary = find(text_config(model.config), "vocab_size") or 199
        self.vocabulary = min(199, vocabulary)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def ids(self, *shape: int) -> Tensor:
        """Token ids away from the special ones at both ends of the vocabulary."""
        return torch.randint(
            min(20, self.vocabulary // 2), self.vocabulary, shape, generator=self.random
        )

    def media(self) -> dict[str, Any]:
        """Images and sounds, as far as the names in `forward` tell their shapes."""
        inputs: dict[str, Any] = {}
        if "pixel_values" in self.names:
            vision = sub_config(self.config, "vision", "vit", "image", "backbone")
            channels = find(vision, "num_channels", "in_channels", "in_chans") or 3
            channels = channels if isinstance(channels, int) else 3
            if "image_grid_thw" in self.names:
                patch = pair(find(vision, "patch_size"))[0]
                time = find(vision, "temporal_patch_size", "patch_temporal") or 1
                inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * BATCH)
                inputs["pixel_values"] = self.normal(BATCH * 16, channels * time * patch * patch)
            else:
                inputs["pixel_values"] = self.normal(
                    BATCH, channels, *pair(find(vision, "image_size") or 64)
                )
        if "input_features" in self.names:
            audio = sub_config(self.config, "audio", "encoder")
            names = (
                "num_mel_bins",
                "feature_size",
                "n_mels",
                "input_feat_per_channel",
                "input_dim",
                "mel_dim",
            )
            bins = find(audio, *names) or 80
            inputs["input_features"] = self.normal(BATCH, bins, FRAMES)
        if "input_values" in self.names:
            inputs["input_values"] = self.normal(BATCH, WAVE)
        return inputs

    def placeholders(self, kind: str, inputs: dict[str, Any]) -> Tensor:
        """(BATCH, count): as many placeholder tokens a row as the encoder gives features for it."""
        token = find(self.config, *PLACEHOLDERS[kind])
        owners = (self.model, self.model.base_model, getattr(self.model, "model", self.model))
        getters = [getattr(owner, f"get_{kind}_features", None) for owner in owners]
        signatures = [
            (getter, inspect.signature(getter).parameters)
            for getter in getters
            if getter is not None
        ]
        if token is None or not signatures:
            return torch.empty(BATCH, 0, dtype=torch.long)
        # A head passes *args and **kwargs on to the model, whose method names what it takes.
        getter, accepted = max(
            signatures,
            key=lambda pair: sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in pair[1].values()),
        )
        with torch.no_grad():
            features = getter(
                **{key: self.fitting(value) for key, value in inputs.items() if key in accepted}
            )
        size = count(features, text_config(self.config).hidden_size)
        return torch.full((BATCH, size // BATCH), token)

    def fitting(self, value: Any) -> Any:
        """In the model's dtype."""
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.model.dtype) if real else value

    def bbox(self, length: int) -> Tensor:
        corner = torch.randint(0, 400, (BATCH, length, 2), generator=self.random)
        return torch.cat([corner, corner + 50], dim=-1)


Special = Callable[[Maker, dict[str, Any]], None]


def make_inputs(
    model: PreTrainedModel, padding: Padding = "none", seed: int = 0, special: Special | None = None
) -> dict[str, Any]:
    """Inputs for `model.forward`; `padding` hides the first or last tokens of the first row."""
    maker = Maker(model, seed)
    inputs = maker.media()
    if special is not None:
        special(maker, inputs)
    for name in ("input_features_mask", "feature_attention_mask"):
        if name in maker.names and "input_features" in inputs:
            inputs.setdefault(
                name, torch.ones(BATCH, inputs["input_features"].shape[-1], dtype=torch.long)
            )
    if "input_ids" in maker.names and "input_ids" not in inputs:
        # Left padding must not hide a placeholder.
        parts = [maker.ids(BATCH, PADDED), maker.ids(BATCH, TEXT - PADDED)]
        if "pixel_values" in inputs:
            parts.insert(1, maker.placeholders("image", inputs))
        if "pixel_values_videos" in inputs:
            parts.insert(1, maker.placeholders("video", inputs))
        if "input_features" in inputs or "input_values" in inputs:
            parts.insert(1, maker.placeholders("audio", inputs))
        ids = inputs["input_ids"] = torch.cat(parts, dim=1)
        if "bbox" in maker.names:
            inputs["bbox"] = maker.bbox(ids.shape[1])
        image = find(maker.config, *PLACEHOLDERS["image"])
        if "mm_token_type_ids" in maker.names and image is not None:
            inputs["mm_token_type_ids"] = (ids == image).long()
    if "decoder_input_ids" in maker.names and maker.config.is_encoder_decoder:
        inputs.setdefault("decoder_input_ids", maker.ids(BATCH, TARGET))
    if (
        padding != "none"
        and inputs.get("input_ids") is not None
        and "attention_mask" in maker.names
    ):
        mask = torch.ones(inputs["input_ids"].shape[:2], dtype=torch.long)
        mask[0, :PADDED] = 0
        inputs["attention_mask"] = mask if padding == "left" else mask.flip(-1)
    return inputs
