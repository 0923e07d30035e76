"""Inputs of single architectures, where the names in `forward` do not tell the shape.

Every function receives the maker and the inputs made by the rules and changes them in place.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .inputs import BATCH, FRAMES, PADDED, TARGET, TEXT, Maker, find, pair, sub_config

Inputs = dict[str, Any]


def drop(*names: str) -> Callable[[Maker, Inputs], None]:
    def change(maker: Maker, inputs: Inputs) -> None:
        for name in names:
            inputs.pop(name, None)

    return change


def _codebooks(
    count: Callable[[Any], int], name: str = "input_ids"
) -> Callable[[Maker, Inputs], None]:
    def change(maker: Maker, inputs: Inputs) -> None:
        inputs[name] = maker.ids(BATCH, TEXT, count(maker.config))

    return change


def _decision_transformer(maker: Maker, inputs: Inputs) -> None:
    config = maker.config
    inputs |= {
        "states": maker.normal(BATCH, TEXT, config.state_dim),
        "actions": maker.normal(BATCH, TEXT, config.act_dim),
        "rewards": maker.normal(BATCH, TEXT, 1),
        "returns_to_go": maker.normal(BATCH, TEXT, 1),
        "timesteps": torch.arange(TEXT).expand(BATCH, -1),
        "attention_mask": torch.ones(BATCH, TEXT),
    }


def _time_series(maker: Maker, inputs: Inputs) -> None:
    config = maker.config
    past = config.context_length + max(config.lags_sequence)
    inputs |= {
        "past_values": maker.normal(BATCH, past),
        "past_time_features": maker.normal(BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": maker.normal(BATCH, config.prediction_length),
        "future_time_features": maker.normal(
            BATCH, config.prediction_length, config.num_time_features
        ),
    }


def _patched_series(maker: Maker, inputs: Inputs) -> None:
    config = maker.config
    inputs["past_values"] = maker.normal(BATCH, config.context_length, config.num_input_channels)


def _frequency_series(maker: Maker, inputs: Inputs) -> None:
    inputs["past_values"] = list(maker.normal(BATCH, 4 * maker.config.patch_length))
    if "freq" in maker.names:
        inputs["freq"] = torch.tensor([0, 1])


def _time_first(*names: str) -> Callable[[Maker, Inputs], None]:
    """Spectrograms as (batch, frames, bins); the number of bins stands under one of `names`."""

    def change(maker: Maker, inputs: Inputs) -> None:
        inputs["input_features"] = maker.normal(BATCH, FRAMES, find(maker.config, *names))
        if "input_features_mask" in maker.names:
            inputs["input_features_mask"] = torch.ones(BATCH, FRAMES, dtype=torch.long)

    return change


def _video(
    frames: Callable[[Any], int], name: str = "pixel_values_videos"
) -> Callable[[Maker, Inputs], None]:
    def change(maker: Maker, inputs: Inputs) -> None:
        vision = sub_config(maker.config, "vision", "video")
        size = pair(find(vision, "image_size", "crop_size") or 32)
        inputs[name] = maker.normal(BATCH, frames(vision), 3, *size)

    return change


def _images_each(
    number: int = 1, **more: Callable[[Maker], Any]
) -> Callable[[Maker, Inputs], None]:
    """Images as (batch, images of the row, channels, height, width)."""

    def change(maker: Maker, inputs: Inputs) -> None:
        shape = inputs["pixel_values"].shape
        inputs["pixel_values"] = maker.normal(shape[0], number, *shape[1:])
        inputs |= {name: make(maker) for name, make in more.items()}

    return change


def _patches(*shape: int) -> Callable[[Maker, Inputs], None]:
    """Patches as images of their own, grid already known."""

    def change(maker: Maker, inputs: Inputs) -> None:
        inputs["pixel_values"] = maker.normal(*shape)

    return change


def _siglip2(maker: Maker, inputs: Inputs) -> None:
    patch = maker.config.vision_config.patch_size
    inputs |= {
        "pixel_values": maker.normal(BATCH, 16, 3 * patch * patch),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
    }


def _mllama(maker: Maker, inputs: Inputs) -> None:
    size = maker.config.vision_config.image_size
    tiles = maker.config.vision_config.max_num_tiles
    inputs |= {
        "pixel_values": maker.normal(BATCH, 1, tiles, 3, size, size),
        "aspect_ratio_ids": torch.full((BATCH, 1), 6),
        "aspect_ratio_mask": torch.ones(BATCH, 1, tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(BATCH, TEXT, 1, tiles, dtype=torch.long),
    }


def _kosmos2(maker: Maker, inputs: Inputs) -> None:
    inputs["input_ids"] = maker.ids(BATCH, 8 + TEXT)
    mask = torch.zeros(BATCH, 8 + TEXT, dtype=torch.long)
    mask[:, 1:9] = 1
    inputs["image_embeds_position_mask"] = mask


def _qformer(maker: Maker, inputs: Inputs) -> None:
    inputs["qformer_input_ids"] = maker.ids(BATCH, 5)
    if "video" in type(maker.config).__name__.lower():
        inputs["pixel_values"] = inputs["pixel_values"][:, None].repeat(1, 4, 1, 1, 1)
        inputs["input_ids"] = torch.cat(
            [torch.full((BATCH, 4 * 8), 255), maker.ids(BATCH, TEXT)], dim=1
        )


def _flattened_patches(maker: Maker, inputs: Inputs) -> None:
    place = torch.stack([torch.arange(12) // 4, torch.arange(12) % 4], dim=-1).expand(BATCH, -1, -1)
    size = maker.config.vision_config.patch_embed_hidden_size
    inputs["flattened_patches"] = torch.cat([place.float(), maker.normal(BATCH, 12, size)], dim=-1)


def _cross_attention(maker: Maker, inputs: Inputs) -> None:
    inputs["encoder_hidden_states"] = maker.normal(BATCH, 5, maker.config.hidden_size)
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def _vision_grid(maker: Maker, inputs: Inputs) -> None:
    config = maker.config
    inputs["pixel_values"] = maker.normal(BATCH * 16, config.in_channels * config.patch_size**2)
    inputs["grid_thw"] = torch.tensor([[1, 4, 4]] * BATCH)


def _gemma4_vision(maker: Maker, inputs: Inputs) -> None:
    place = (
        torch.stack([torch.arange(36) % 6, torch.arange(36) // 6], dim=-1)
        .expand(BATCH, -1, -1)
        .clone()
    )
    place[0, 27:] = -1  # padding patches
    inputs["pixel_values"] = maker.normal(BATCH, 36, 3 * maker.config.patch_size**2)
    inputs["pixel_position_ids"] = place


def _minicpm_vision(maker: Maker, inputs: Inputs) -> None:
    patch = maker.config.patch_size
    inputs["pixel_values"] = maker.normal(1, 3, patch, BATCH * 16 * patch)
    inputs["target_sizes"] = torch.tensor([[4, 4]] * BATCH, dtype=torch.int32)


def _qwen2_audio(maker: Maker, inputs: Inputs) -> None:
    audio = torch.full(
        (BATCH, FRAMES // 4), find(maker.config, "audio_token_index", "audio_token_id")
    )
    inputs["input_ids"] = torch.cat(
        [maker.ids(BATCH, PADDED), audio, maker.ids(BATCH, TEXT - PADDED)], dim=1
    )
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def _codec(maker: Maker, inputs: Inputs) -> None:
    inputs["input_values"] = maker.normal(BATCH, 1, 3200)
    inputs["input_features"] = maker.normal(
        BATCH, 10, find(maker.config, "feature_projection_input_dim")
    )
    inputs["input_features_mask"] = torch.ones(BATCH, 10, dtype=torch.long)


def _molmo2(maker: Maker, inputs: Inputs) -> None:
    patch = maker.config.vision_config.patch_size
    pooled = torch.arange(BATCH * 16).view(
        BATCH * 4, 4
    )  # four patches for each of four image tokens
    inputs |= {
        "pixel_values": maker.normal(BATCH, 16, 3 * patch * patch),
        "image_token_pooling": pooled,
        "image_grids": torch.tensor([[2, 2, 0, 0]] * BATCH),
        "image_num_crops": torch.ones(BATCH, dtype=torch.long),
    }


def _esmfold2(maker: Maker, inputs: Inputs) -> None:
    module = importlib.import_module(type(maker.model).__module__)
    config, tokens, atoms = maker.config, 6, 18
    owner = (torch.arange(atoms) // 3).expand(BATCH, -1)
    position = torch.arange(tokens).expand(BATCH, -1)
    zeros = torch.zeros(BATCH, tokens, dtype=torch.long)
    inputs |= {
        "token_index": position,
        "residue_index": position,
        "asym_id": zeros,
        "sym_id": zeros,
        "entity_id": zeros,
        "mol_type": zeros,
        "res_type": torch.randint(0, 20, (BATCH, tokens), generator=maker.random),
        "token_bonds": torch.zeros(BATCH, tokens, tokens, 1),
        "attention_mask": torch.ones(BATCH, tokens, dtype=torch.long),
        "input_ids": torch.randint(4, 24, (BATCH, tokens), generator=maker.random),
        "atom_inputs": module.EsmFold2AtomInputs(
            ref_pos=maker.normal(BATCH, atoms, 3),
            ref_charge=torch.zeros(BATCH, atoms),
            atom_attention_mask=torch.ones(BATCH, atoms, dtype=torch.bool),
            ref_element=torch.randint(1, 20, (BATCH, atoms), generator=maker.random),
            ref_atom_name_chars=torch.randint(
                1, 20, (BATCH, atoms, config.max_chars), generator=maker.random
            ),
            ref_space_uid=owner,
            atom_to_token=owner,
        ),
    }


def _audio_and_video(maker: Maker, inputs: Inputs) -> None:
    inputs["input_values"] = maker.normal(BATCH, 1, 4 * 1920)
    inputs["pixel_values_videos"] = maker.normal(BATCH, 4, 3, 32, 32)


def _tracking(maker: Maker, inputs: Inputs) -> None:
    """Two frames and an object, given by a point in the first; the second frame uses the memory."""
    module = importlib.import_module(type(maker.model).__module__)
    session_class = getattr(module, type(maker.model).__name__.replace("Model", "InferenceSession"))
    size = pair(find(maker.config.prompt_encoder_config, "image_size"))[0]
    video = maker.normal(2, 3, size, size).to(maker.model.dtype)
    session = session_class(
        video=video, video_height=size, video_width=size, dtype=maker.model.dtype
    )
    index = session.obj_id_to_idx(1)
    point = {
        "point_coords": torch.tensor([[[[5.0, 5.0]]]]),
        "point_labels": torch.ones(1, 1, 1, dtype=torch.int32),
    }
    session.add_point_inputs(index, 0, point)
    session.obj_with_new_inputs = [1]
    with torch.no_grad():
        maker.model(inference_session=session, frame_idx=0)
    inputs |= {"inference_session": session, "frame_idx": 1}


INPUTS: dict[str, Callable[[Maker, Inputs], None]] = {
    "audio_spectrogram_transformer": lambda m, x: x.update(input_values=m.normal(BATCH, 64, 32)),
    "bert/decoder": _cross_attention,
    "bert_generation/decoder": _cross_attention,
    "blt": lambda m, x: x.update(use_cache=False),
    "camembert/decoder": _cross_attention,
    "canary": _time_first("num_mel_bins"),
    "clap": lambda m, x: x.update(input_features=m.normal(BATCH, 1, 64, 32)),
    "cohere_asr": _time_first("num_mel_bins"),
    "csm": drop("input_values"),
    "data2vec_text/decoder": _cross_attention,
    "decision_transformer": _decision_transformer,
    "dia": lambda m, x: x.update(decoder_input_ids=m.ids(BATCH, TARGET, 9)),
    "dots3_note": drop("input_features"),
    "dots3_note/audio": lambda m, x: x.update(
        chunk_sample_lengths=torch.tensor([FRAMES * 160, FRAMES * 120])
    ),
    "edgetam": lambda m, x: x.update(pixel_values=m.normal(BATCH, 3, 64, 64)),
    "edgetam_video": _tracking,
    "efficientloftr": _images_each(2),
    "electra/decoder": _cross_attention,
    "embedding_gemma2": drop("pixel_values", "input_features"),
    "emu3": drop("pixel_values"),
    "ernie/decoder": _cross_attention,
    "esmfold2": _esmfold2,
    "evolla/protein": lambda m, x: x.update(
        attention_mask=torch.ones(BATCH, TEXT, dtype=torch.long)
    ),
    "fun_asr_nano": lambda m, x: x.update(
        input_features=m.normal(BATCH, FRAMES, 560),
        input_features_mask=torch.ones(BATCH, FRAMES, dtype=torch.long),
    ),
    "gemma4": drop("pixel_values", "input_features"),
    "gemma4/vision": _gemma4_vision,
    "gemma4_unified": drop("pixel_values", "input_features"),
    "glm_image": drop("pixel_values", "image_grid_thw"),
    "glm_image/vision": _vision_grid,
    "granite4_vision": drop("pixel_values"),
    "granite_docling": _images_each(
        pixel_attention_mask=lambda m: torch.ones(BATCH, 1, dtype=torch.bool)
    ),
    "granite_speech5": lambda m, x: x.update(input_features=m.normal(BATCH, FRAMES, 320)),
    "idefics": _images_each(
        image_attention_mask=lambda m: torch.ones(BATCH, TEXT, 1, dtype=torch.long)
    ),
    "idefics2": _images_each(),
    "idefics3": _images_each(),
    "informer": _time_series,
    "inkling": _patches(BATCH * 4, 2, 8, 8, 3),
    "inkling2": _patches(BATCH * 16, 16, 16, 3),
    "instructblip": _qformer,
    "instructblipvideo": _qformer,
    "kimi_k25": _patches(BATCH * 16, 3, 8, 8),
    "kosmos2": _kosmos2,
    "kyutai_speech_to_text": _codebooks(lambda config: config.num_codebooks + 1),
    "lasr": _time_first("num_mel_bins"),
    "lightglue": _images_each(2),
    "maskformer": lambda m, x: x.update(pixel_values=m.normal(BATCH, 3, 96, 96)),
    "mimi": lambda m, x: x.update(input_values=m.normal(BATCH, 1, 4 * 1920)),
    "minicpm_ocr/vision": _minicpm_vision,
    "minicpmv4_6/vision": _minicpm_vision,
    "minicpmv4_7/vision": _minicpm_vision,
    "mistral_large4": lambda m, x: x.update(image_sizes=torch.tensor([[32, 32]] * BATCH)),
    "mllama": _mllama,
    "molmo2": _molmo2,
    "moss_transcribe_diarize": lambda m, x: x.update(
        padding_mask=torch.ones(BATCH, 10000, dtype=torch.long)
    ),
    "muse_glimmer_assistant": lambda m, x: x.update(
        noise_embeds=m.normal(BATCH, 4, 64), context_hidden_states=m.normal(BATCH, 6, 64 * 2)
    ),
    "muse_spark": drop("input_values"),
    "musicgen": lambda m, x: x.update(decoder_input_ids=m.ids(BATCH * 4, TARGET)),
    "musicgen_melody": lambda m, x: x.update(
        decoder_input_ids=m.ids(BATCH * 4, TARGET), input_features=m.normal(BATCH, 8, 12)
    ),
    "nemotron3_5_transcribe": lambda m, x: x.update(
        input_features=m.normal(BATCH, FRAMES, 128),
        input_features_mask=torch.ones(BATCH, FRAMES, dtype=torch.long),
    ),
    "nemotron3_diarization": _time_first("num_mel_bins"),
    "nemotron_asr_streaming": _time_first("num_mel_bins"),
    "neomme": _patches(BATCH * 4, 192),
    "neucodec": _codec,
    "paddleocr_vl": _patches(BATCH * 16, 3, 8, 8),
    "parakeet": _time_first("num_mel_bins"),
    "patchtsmixer": _patched_series,
    "patchtst": _patched_series,
    "pe_audio": lambda m, x: x.update(input_values=m.normal(BATCH, 1, 4 * 1920)),
    "pe_audio_video": _audio_and_video,
    "pe_video": _video(lambda config: 4),
    "phi4_multimodal/audio": lambda m, x: x.update(
        hidden_states=m.normal(BATCH, FRAMES, 32), mask=None
    ),
    "pix2struct": _flattened_patches,
    "pocket_tts_audio_tokenizer": lambda m, x: x.update(input_values=m.normal(BATCH, 1, 7680)),
    "pop2piano": lambda m, x: x.update(input_features=m.normal(BATCH, 8, 64), input_ids=None),
    "pp_doclayout_v3": lambda m, x: x.update(pixel_values=m.normal(BATCH, 3, 128, 128)),
    "pp_ocrv5_mobile_rec": lambda m, x: x.update(pixel_values=m.normal(BATCH, 3, 96, 256)),
    "pp_ocrv5_server_rec": lambda m, x: x.update(pixel_values=m.normal(BATCH, 3, 48, 64)),
    "pp_ocrv6_small_rec": lambda m, x: x.update(pixel_values=m.normal(BATCH, 3, 48, 64)),
    "qwen2_audio": _qwen2_audio,
    "qwen3_asr": lambda m, x: x.update(input_features=m.normal(BATCH, 128, 100)),
    "qwen3_omni_moe/code2wav": lambda m, x: x.update(codes=m.ids(BATCH, 16, 4)),
    "qwen3_omni_moe/code_predictor": lambda m, x: x.update(
        inputs_embeds=m.normal(BATCH, TEXT, 64), input_ids=None
    ),
    "roberta/decoder": _cross_attention,
    "roberta_prelayernorm/decoder": _cross_attention,
    "roc_bert/decoder": _cross_attention,
    "sam2": lambda m, x: x.update(pixel_values=m.normal(BATCH, 3, 64, 64)),
    "sam2_video": _tracking,
    "sam3_tracker_video": _tracking,
    "seamless_m4t": _time_first("feature_projection_input_dim"),
    "seamless_m4t_v2": _time_first("feature_projection_input_dim"),
    "siglip2": _siglip2,
    "smolvlm": _images_each(),
    "speech_to_text": _time_first("input_feat_per_channel"),
    "time_series_transformer": _time_series,
    "timesfm": _frequency_series,
    "timesfm2_5": _frequency_series,
    "video_llama_3": lambda m, x: x.update(image_merge_sizes=torch.tensor([2] * BATCH)),
    "videomae": _video(lambda config: config.num_frames, "pixel_values"),
    "videomt": _video(lambda config: 2),
    "videoprism": _video(lambda config: config.num_frames),
    "vivit": _video(lambda config: config.num_frames, "pixel_values"),
    "vjepa2": _video(lambda config: 4),
    "vjepa2/classification": _video(lambda config: 4),
    "voxtral_realtime": lambda m, x: x.update(input_ids=m.ids(BATCH, 8)),
    "wav2vec2_bert": _time_first("feature_projection_input_dim"),
    "x_clip": _video(lambda config: config.num_frames, "pixel_values"),
    "xcodec2": _codec,
    "xlm_roberta/decoder": _cross_attention,
    "xlm_roberta_xl/decoder": _cross_attention,
    "xmod/decoder": _cross_attention,
}
