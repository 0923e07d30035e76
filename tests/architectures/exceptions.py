"""What the rules cannot know about single architectures. Keep it short: a rule is better."""

from typing import Any

from transformers import ResNetConfig

from .stand_ins import PyramidConfig

_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE: dict[str, Any] = {**_ROPE, "mrope_section": [2, 3, 3]}
_DECODER: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}
_MOE: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
_WINDOWED_STAGES: dict[str, Any] = {
    "num_block_repeats": [1, 1],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "expand_ratios": [1, 6],
}


def _small_resnet(**more: Any) -> ResNetConfig:
    stages: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
    return ResNetConfig(embedding_size=16, **stages, **more)


_FEATURES = [[16, 16], [8, 8], [4, 4]]
_SAM2: dict[str, Any] = {
    "vision_config": {
        "backbone_config": {
            "image_size": [64, 64],
            "global_attention_blocks": [4],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "num_attention_heads_per_stage": [1, 2, 4, 4],
        },
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": _FEATURES,
    },
    "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
}

# Object pointers are split into memory tokens, so the memory is narrower than the rest; its width
# is fixed in the code.
_MEMORY: dict[str, Any] = {
    "mask_decoder_config": {"hidden_size": 128},
    "memory_attention_hidden_size": 128,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 128,
    "memory_encoder_output_channels": 64,
    "memory_fuser_embed_dim": 128,
    "mask_downsampler_embed_dim": 128,
}

# Configuration fields by architecture; a nested dict goes to the sub-configuration of that name.
CONFIG: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config": {
            **_WINDOWED_STAGES,
            "width_coefficient": 1.0,
            "in_channels": [32, 16],
            "out_channels": [16, 64],
        }
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "audio_spectrogram_transformer": {"max_length": 64, "num_mel_bins": 32},
    "bamba": {"attn_layer_indices": [1]},
    "bert/decoder": _DECODER,
    "bert_generation/decoder": _DECODER,
    "blip_2": {"image_token_id": 255},
    "camembert/decoder": _DECODER,
    "chameleon": {
        "vocabulary_map": {"<image>": 250} | {f"IMGIMG{chr(65 + i)}Z": 100 + i for i in range(8)},
        "vq_config": {"num_embeddings": 8},
    },
    "clap": {
        "audio_config": {"spec_size": 128, "num_mel_bins": 32, "window_size": 4, "hidden_size": 128}
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    "conditional_detr": {"backbone_config": _small_resnet(out_features=["stage4"])},
    "data2vec_text/decoder": _DECODER,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {**_MOE, "mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v2": _MOE,
    "deformable_detr": {
        "backbone_config": _small_resnet(out_features=["stage2", "stage3", "stage4"])
    },
    "detr": {"backbone_config": _small_resnet(out_features=["stage4"])},
    "diffusion_gemma": {
        "text_config": {
            "global_head_dim": 32,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    },
    "dots1": {**_MOE, "n_shared_experts": 1},
    "dots3_note": {"audio_config": {"adapter_input_size": 64}},
    "dots3_note/audio": {"adapter_input_size": 64},
    "edgetam": {
        "vision_config": {
            "backbone_config": PyramidConfig(),
            "backbone_channel_list": [64, 32, 16, 16],
            "backbone_feature_sizes": _FEATURES,
        },
        "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
    },
    "edgetam_video": {
        **_MEMORY,
        "vision_config": {**_SAM2["vision_config"], "fpn_hidden_size": 128},
        "prompt_encoder_config": {**_SAM2["prompt_encoder_config"], "hidden_size": 128},
        "image_size": 64,
        "memory_attention_rope_k_sizes": [2, 2],
        "perceiver_resampler_hidden_size": 64,
        "perceiver_resampler_attention_head_dim": 64,
        "perceiver_resampler_num_latents": 4,
        "perceiver_resampler_num_latents_2d": 4,
    },
    "efficientloftr": {
        "out_features": [16, 16, 32, 64],
        "hidden_size": 64,
        "num_attention_heads": 8,
    },
    "electra/decoder": _DECODER,
    "embedding_gemma2": {"text_config": {"global_head_dim": 32}},
    "emu3": {"vocabulary_map": {"<image>": 250, "<|extra_200|>": 251}},
    "ernie/decoder": _DECODER,
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}},
    "esm": {"vocab_size": 256, "mask_token_id": 32, "pad_token_id": 1},
    "esmfold2": {
        "atom_encoder": {"hidden_size": 128, "output_dim": 384},
        "structure_head": {
            "diffusion_module": {
                "hidden_size": 128,
                "atom_encoder": {"hidden_size": 128, "output_dim": 128},
            }
        },
        "single_inputs_size": 451,
        "num_loops": 1,
        "atom_feature_dim": None,
    },
    "evolla/protein": {"vocab_size": 256},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 64,
    },
    "gemma4": {"text_config": {"global_head_dim": 32}},
    "gemma4_unified": {"text_config": {"global_head_dim": 32}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
        }
    },
    "glm_image": {"text_config": {"rope_parameters": _MROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "granite4_vision": {"deepstack_layer_map": [(-1, 0)], "downsample_rate": "4/8"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config": {"rope_parameters": _MROPE}},
    "informer": {
        "prediction_length": 4,
        "context_length": 16,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
        "attention_type": "full",
    },
    "instructblip": {"image_token_id": 255},
    "instructblipvideo": {"video_token_index": 255},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lightglue": {
        "keypoint_detector_config": {
            "keypoint_decoder_dim": 65,
            "keypoint_threshold": 0.0,
            "border_removal_distance": 0,
        }
    },
    "llama4": {
        "vision_config": {
            "projector_input_dim": 64,
            "pixel_shuffle_ratio": 0.5,
            "intermediate_size": 256,
        }
    },
    "longcat_flash": {"head_dim": 8},
    "lw_detr": {
        "backbone_config": {"image_size": 64, "num_windows": 4, "window_block_indices": [0]},
        "projector_scale_factors": [1.0],
        "num_feature_levels": 1,
    },
    "minimax_m3_vl": {
        "text_config": {
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_n_heads": 2,
        }
    },
    "mistral_large4": {
        "text_config": {
            "num_hidden_layers": 3,
            "kv_source_layers": [0, 1, 0],
            "no_rope_layers": [1, 0, 1],
        }
    },
    "mllama": {
        "text_config": {"num_hidden_layers": 2, "cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    },
    "molmo2": {
        "vision_config": {"image_size": [32, 32], "num_position_embeddings": 16},
        "adapter_config": {"vision_feature_layer": [-1, -2]},
    },
    "moonshine_streaming": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "neucodec": {"quantization_dim": 128, "num_key_value_heads": 4},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "patchtsmixer": {"self_attn": True, "self_attn_heads": 2},
    "patchtst": {"patch_length": 4, "patch_stride": 4},
    "pe_audio_video": {
        "audio_video_config": {"video_config": {"vision_config": _small_resnet(num_labels=16)}}
    },
    "pe_video": {"video_config": {"vision_config": _small_resnet(num_labels=16)}},
    "pp_doclayout_v2": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "pp_ocrv6_small_rec": {"backbone_config": {"stem_channels": [3, 48, 96]}},
    "pp_formulanet": {"vision_config": {"image_size": 128}},
    "qwen2_5_omni": {"text_config": {"rope_parameters": _MROPE}, "vision_start_token_id": 250},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen3_omni_moe": {"vision_start_token_id": 250},
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
    "roberta/decoder": _DECODER,
    "roberta_prelayernorm/decoder": _DECODER,
    "roc_bert/decoder": _DECODER,
    "sam": {"vision_config": {"num_pos_feats": 32}},
    "sam2": _SAM2,
    "sam2_video": {
        **_MEMORY,
        "vision_config": {**_SAM2["vision_config"], "fpn_hidden_size": 128},
        "prompt_encoder_config": {**_SAM2["prompt_encoder_config"], "hidden_size": 128},
    },
    "sam3_lite_text/text": {"use_repmixer_blocks": False},
    "sam3_tracker": {"vision_config": {"backbone_feature_sizes": _FEATURES}},
    "sam3_tracker_video": {
        **_MEMORY,
        "image_size": 32,
        "vision_config": {"fpn_hidden_size": 128},
        "prompt_encoder_config": {"hidden_size": 128},
    },
    "sam_hq": {"vision_config": {"num_pos_feats": 32}},
    "sapiens2": {"patch_size": 8, "image_size": [32, 32], "num_key_value_heads_per_layer": [2, 4]},
    "step3p7": {"text_config": {"sliding_window": 5, "moe_num_experts": 4}},
    "swin": {
        "image_size": 64,
        "window_size": 4,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "out_indices": [2],
    },
    "time_series_transformer": {
        "prediction_length": 4,
        "context_length": 16,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
    },
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    "voxtral": {"audio_token_id": 255},
    "wav2vec2_bert": {"vocab_size": 256},
    "wav2vec2_conformer": {"vocab_size": 256},
    "xcodec2": {"quantization_dim": 128, "num_key_value_heads": 4},
    "xlm_roberta/decoder": _DECODER,
    "xlm_roberta_xl/decoder": _DECODER,
    "xmod": {"default_language": "en_XX"},
    "xmod/decoder": {**_DECODER, "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": [
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "hybrid",
        ],
    },
}

# Parameters get noise of this relative size instead of 1: stacks of convolutions that would
# overflow.
NOISE: dict[str, float] = {
    "mimi": 0.3,
    "pp_ocrv5_mobile_rec": 0.4,
    "pp_ocrv6_small_rec": 0.5,
    "qwen3_omni_moe/code2wav": 0.3,
}

# Model class by architecture, where the preference of the builder picks a less telling one;
# "architecture/part" adds a second model of the same modeling file, for attention that the first
# does not reach.
MODEL: dict[str, str] = {
    "bert/decoder": "BertLMHeadModel",
    "bert_generation/decoder": "BertGenerationDecoder",
    "camembert/decoder": "CamembertForCausalLM",
    "data2vec_text/decoder": "Data2VecTextForCausalLM",
    "decision_transformer": "DecisionTransformerModel",
    "dots3_note/audio": "Dots3NoteAudioModel",
    "electra/decoder": "ElectraForCausalLM",
    "ernie/decoder": "ErnieForCausalLM",
    "evolla/protein": "EvollaSaProtProteinEncoder",
    "gemma3n": "Gemma3nForCausalLM",
    "gemma4/vision": "Gemma4VisionModel",
    "glm_image/vision": "GlmImageVisionModel",
    "mimi": "MimiEncoderModel",
    "minicpm_ocr/vision": "MiniCPMOcrVisionModel",
    "minicpmv4_6/vision": "MiniCPMV4_6VisionModel",
    "minicpmv4_7/vision": "MiniCPMV4_7VisionModel",
    "moshi": "MoshiForCausalLM",
    "muse_glimmer_assistant": "MuseGlimmerAssistantModel",
    "phi4_multimodal/audio": "Phi4MultimodalAudioModel",
    "phi4_multimodal/vision": "Phi4MultimodalVisionModel",
    "pp_ocrv5_mobile_rec": "PPOCRV5MobileRecForTextRecognition",
    "pp_ocrv5_server_rec": "PPOCRV5ServerRecForTextRecognition",
    "pp_ocrv6_small_rec": "PPOCRV6SmallRecForTextRecognition",
    "qwen3_omni_moe/code2wav": "Qwen3OmniMoeCode2Wav",
    "qwen3_omni_moe/code_predictor": "Qwen3OmniMoeTalkerCodePredictorModel",
    "roberta/decoder": "RobertaForCausalLM",
    "roberta_prelayernorm/decoder": "RobertaPreLayerNormForCausalLM",
    "roc_bert/decoder": "RoCBertForCausalLM",
    "sam3_lite_text/text": "Sam3LiteTextTextModel",
    "seamless_m4t": "SeamlessM4TForSpeechToText",
    "seamless_m4t_v2": "SeamlessM4Tv2ForSpeechToText",
    "vitpose_backbone": "VitPoseBackbone",
    "vjepa2/classification": "VJEPA2ForVideoClassification",
    "xlm_roberta/decoder": "XLMRobertaForCausalLM",
    "xlm_roberta_xl/decoder": "XLMRobertaXLForCausalLM",
    "xmod/decoder": "XmodForCausalLM",
}

# Dotted paths of sub-configurations whose part computes attention by itself (or picks its class by
# the name of the implementation when it is built) and stays eager; "" is the model's own
# configuration. The package must refuse these architectures as a whole and run the rest of them.
KEEP_EAGER: dict[str, tuple[str, ...]] = {
    "aria": ("",),
    "bridgetower": ("vision_config",),
    "chameleon": ("vq_config",),
    "clap": ("audio_config",),
    "deepseek_ocr2": ("vision_config.sam_config",),
    "git": ("",),
    "janus": ("vq_config",),
    "kosmos2_5": ("vision_config",),
    "maskformer": ("backbone_config",),
    "pp_formulanet": ("vision_config",),
    "sam": ("vision_config",),
    "sam_hq": ("vision_config",),
    "unlimited_ocr": ("vision_config.sam_config",),
}

# Architectures of which no part can be chosen: one configuration serves modules that ask the
# registry and modules that compute attention by themselves. The package must refuse them.
REFUSED: dict[str, str] = {
    "bigbird_pegasus": "the encoder's attention, sparse or full, is its own",
    "evolla": "the sequence compressor's attention is its own, and shares a config with the decoder's",
    "longt5": "the encoder's local attention is its own",
    "pegasus_x": "the encoder's global-local attention is its own",
}

# Models whose own eager attention is no reference: nemotron_asr_streaming reads the additive mask
# of eager attention as a logical one, which inverts it, and is right with boolean masks only.
BOOLEAN_MASK: set[str] = {"nemotron_asr_streaming"}

# Models whose attention mask is more than a padding of text.
NO_PADDING: set[str] = {"esmfold2"}

# Models whose code computes in float32 whatever their dtype.
SINGLE_PRECISION: set[str] = {"esmfold2", "inkling2", "kosmos2", "timesfm"}

# Architectures without a spectral kernel with learned frequencies, which needs the size of a head when
# the model is built and has no logit to cap.
NO_SPECTRAL_KERNEL: dict[str, str] = {
    "conditional_detr": "cross-attention concatenates two keys into one of twice the head's size",
    "florence2": "channel attention: the size of a head is the number of tokens",
    "gemma2": "caps logits",
    "t5gemma": "caps logits",
    "vaultgemma": "caps logits",
    "videoprism": "caps logits",
}

# Outputs at positions that see no key: zero by contract, where softmax spreads its weight evenly.
BLIND: dict[str, tuple[str, ...]] = {
    "timesfm": (".last_hidden_state",),
    "timesfm2_5": (".last_hidden_state",),
}

#: Seed of the checks of a learned kernel where the first one does not serve: random weights predict
#: boxes outside the picture there, which the model itself refuses (with eager attention elsewhere).
KERNEL_SEED = {"pp_doclayout_v2": 1}

# Seed at which rounding does not decide which boxes are kept, where the first one does not serve.
CONVERSION_SEED: dict[str, int] = {"deimv2": 2}
