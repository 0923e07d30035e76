"""What the rules cannot know about single architectures. Keep it short: a rule is better."""

from typing import Any

from transformers import ResNetConfig

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 3, 3]}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
_MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
_WINDOWED_STAGES = {"num_block_repeats": [1, 1], "kernel_sizes": [3, 3], "strides": [1, 2], "expand_ratios": [1, 6]}

# Configuration fields by architecture; a nested dict goes to the sub-configuration of that name.
CONFIG: dict[str, dict[str, Any]] = {
    "align": {"vision_config": {**_WINDOWED_STAGES, "width_coefficient": 1.0, "in_channels": [32, 16], "out_channels": [16, 64]}},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "audio_spectrogram_transformer": {"max_length": 64, "num_mel_bins": 32},
    "bamba": {"attn_layer_indices": [1]},
    "blip_2": {"image_token_id": 255},
    "chameleon": {
        "vocabulary_map": {"<image>": 250} | {f"IMGIMG{chr(65 + i)}Z": 100 + i for i in range(8)},
        "vq_config": {"num_embeddings": 8},
    },
    "clap": {"audio_config": {"spec_size": 64, "num_mel_bins": 16}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    "conditional_detr": {"backbone_config": ResNetConfig(**_RESNET, out_features=["stage4"])},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {**_MOE, "mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v2": _MOE,
    "deformable_detr": {"backbone_config": ResNetConfig(**_RESNET, out_features=["stage2", "stage3", "stage4"])},
    "detr": {"backbone_config": ResNetConfig(**_RESNET, out_features=["stage4"])},
    "diffusion_gemma": {
        "text_config": {"global_head_dim": 32, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "dots1": {**_MOE, "n_shared_experts": 1},
    "dots3_note": {"audio_config": {"adapter_input_size": 64}},
    "efficientloftr": {"out_features": [16, 16, 32, 64], "hidden_size": 64},
    "embedding_gemma2": {"text_config": {"global_head_dim": 32}},
    "emu3": {"vocabulary_map": {"<image>": 250, "<|extra_200|>": 251}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}},
    "esm": {"vocab_size": 256, "mask_token_id": 32, "pad_token_id": 1},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma4": {"text_config": {"global_head_dim": 32}},
    "gemma4_unified": {"text_config": {"global_head_dim": 32}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "granite4_vision": {"deepstack_layer_map": [(-1, 0)]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config": {"rope_parameters": _MROPE}},
    "informer": {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1},
    "instructblip": {"image_token_id": 255},
    "instructblipvideo": {"video_token_index": 255},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"vision_config": {"projector_input_dim": 64, "pixel_shuffle_ratio": 0.5, "intermediate_size": 256}},
    "longcat_flash": {"head_dim": 8},
    "lw_detr": {"backbone_config": {"image_size": 64, "num_windows": 4, "window_block_indices": [0]}},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 1], "num_hidden_layers": 3}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "moonshine_streaming": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "patchtsmixer": {"self_attn": True, "self_attn_heads": 2},
    "patchtst": {"patch_length": 4, "patch_stride": 4},
    "pp_doclayout_v2": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "qwen2_5_omni": {"thinker_config": {"text_config": {"rope_parameters": _MROPE}}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen3_asr": {"audio_config": {"n_window": 8, "n_window_infer": 32}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        }
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "sam": {"vision_config": {"num_pos_feats": 32}},
    "sam_hq": {"vision_config": {"num_pos_feats": 32}},
    "step3p7": {"text_config": {"sliding_window": 5}},
    "swin": {"window_size": 4},
    "time_series_transformer": {
        "prediction_length": 4,
        "context_length": 16,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
    },
    "voxtral": {"audio_token_id": 255},
    "wav2vec2_bert": {"vocab_size": 256},
    "wav2vec2_conformer": {"vocab_size": 256},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]},
}

# Model class by architecture, where the preference of the builder picks a less telling one.
MODEL: dict[str, str] = {
    "decision_transformer": "DecisionTransformerModel",
    "muse_glimmer_assistant": "MuseGlimmerAssistantModel",
    "vitpose_backbone": "VitPoseBackbone",
    "mimi": "MimiModel",
}

# Sub-configurations that cannot take a registered name (their classes are chosen by it when the model is built) and
# stay eager; "" is the model itself.
KEEP_EAGER: dict[str, tuple[str, ...]] = {
    "git": ("",),
    "sam": ("vision_config",),
    "sam_hq": ("vision_config",),
}
