"""Shrink any Transformers configuration by rules on its field names.

A rule is a monotone function of the old value and the same for every field of one kind, so that
sizes that had to agree before (the width of a tower and the input width of its projector) still
agree afterwards. What a rule cannot know stands in the table of exceptions (`exceptions.py`), not
here.
"""

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 256
# Special token ids from here on move into the free range below the small vocabulary.
FIRST_SPECIAL = 200


def width(value: int) -> int:
    """New size of a feature dimension: 64, 32 or 16, according to its old size."""
    if value >= 256:
        return 64
    if value >= 128:
        return 32
    return 16 if value >= 64 else value


def heads(value: int) -> int:
    """Largest power of two up to `value`, at most 4."""
    return min(4, 1 << (value.bit_length() - 1)) if value > 0 else value


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def same(value: int) -> int:
    return value


# The first match wins. A rule maps an old int to a new one, inside lists and tuples as well.
_RULES: list[tuple[str, Callable[[int], int]]] = [
    # tokens and positions
    (
        r"^(image|video|audio)_seq_length$|^num_image_tokens$|_soft_tokens_per_image$|^mm_tokens",
        at_most(4),
    ),
    (
        r"(^|_)vocab_size(_per_layer_input)?$|_vocab$|^(additional|unpadded)_vocab",
        at_most(VOCABULARY),
    ),
    (r"max_position_embeddings$|^n_positions$|max_target_positions$", at_most(512)),
    (r"max_source_positions$", at_most(32)),
    (r"^max_seq_len$|^max_vit_seq_len$|^position_embedding_size$|^max_ep_len$", at_most(512)),
    (r"^ngram_vocab_size_base$|_embeddings$|^codebook_size$|^num_embeds$", at_most(512)),
    # windows shorter than the test sequences, so that they matter
    (r"^(sliding_window|sliding_window_size|attention_window_size)$", at_most(5)),
    (r"^(local_attention|attention_chunk_size|local_attention_window_len)$", at_most(8)),
    # heads
    (
        r"key_value_heads(_per_layer|_per_stage)?$|^kv_n_heads$|key_value_attention_heads$",
        at_most(2),
    ),
    (r"^mamba_d_head$|^mamba_head_?dim$", at_most(32)),
    (r"heads(_per_layer|_per_stage)?$|(^|_)n_head$|^num_query_groups$", heads),
    (r"^qk_(rope|nope)_head_dim$|^rotary_dim$|^d_rel$", at_most(8)),
    (r"^v_head_dim$", at_most(12)),
    (r"head_dim$|^head_size$|^d_kv$|^kv_channels$|^resampler_dim_head$", at_most(16)),
    # depth
    (r"^num_(feat_extract|conv|adapter)_layers$", same),
    (r"(^|_)layers$|^n_layers?$|(^|_)depth$|^num_blocks$|_num_layers$", at_most(2)),
    (r"^depths$|^stage_numb?_|^num_block_repeats$|^blocks_per_stage$", at_most(2)),
    # mixtures of experts
    (r"^(n_routed|num|num_local|moe_num)_(local_)?experts$|^zero_expert_num$", at_most(4)),
    (r"experts?_per_tok(en)?$|^moe_k$|^moe_top_?k$|^top_k_experts$", at_most(2)),
    (r"^n_groups?$|^topk_group$|^num_expert_group$", at_most(1)),
    # sparse attention
    (r"^index_topk$|^index_block_size$", at_most(4)),
    (r"^index_topk_blocks$|^index_local_blocks$|^index_kpool$", at_most(2)),
    # images
    (r"^patch_size$", lambda value: 8 if value >= 8 else value),
    (
        r"^(image|input|max_img|pretrain_image|crop)_size$",
        lambda value: 32 if value >= 32 else value,
    ),
    (r"^pos_emb_(height|width)$|^posemb_grid_size$", at_most(8)),
    (r"^num_queries$|^num_query_tokens$|n_latents$|num_latents$|^latent_query_num$", at_most(8)),
    (r"^num_detection_tokens$|^two_stage_num_proposals$|^num_denoising$", at_most(8)),
    (r"^num_filters$", at_most(16)),
    # part of the input rather than widths
    (r"mel_bins$|_bins$|^num_frames$|^frame_size$|^sampling|^hop_length$|_multiple_of$", same),
    (r"^(num|in|audio)_channels$|kernel|stride|norm|scale|rate$|^mel_dim$", same),
    (
        r"hidden|embd|d_model|^d_ff$|^dff$|dims?$|channel|rank|width|ffn|intermediate|embed|groups$",
        width,
    ),
    (r"projection_size|projector|proj_size|output_size$|^n_inner$|dimension$|_features$", width),
]
# Caps far above the scores of a tiny model, or branches scaled to nothing, would never be noticed.
_FLOATS = {"attn_logit_softcapping": 1.0, "layer_scale_initial_scale": 1.0}
_COMPILED = [(re.compile(pattern), rule) for pattern, rule in _RULES]
_TOKEN_ID = re.compile(r"token_(id|ids|index)$|_id$")
# Left to the class where it derives them: they follow from the small widths and head counts.
_DERIVED_AGAIN = re.compile(
    r"head_dim|heads|intermediate|attention_hidden|rope|layer|window|global_attention"
)
_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "decoder_layers",
)


class TokenIds:
    """Moves special token ids below `VOCABULARY`: equal ids stay equal, different ones different."""

    def __init__(self) -> None:
        self._moved: dict[int, int] = {}

    def __call__(self, value: int) -> int:
        if value < FIRST_SPECIAL:
            return value
        return self._moved.setdefault(value, FIRST_SPECIAL + len(self._moved))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _map(value: Any, rule: Callable[[int], int]) -> Any:
    if _is_int(value):
        return rule(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, rule) for item in value)
    return value


def _rule(name: str) -> Callable[[int], int] | None:
    return next((rule for pattern, rule in _COMPILED if pattern.search(name)), None)


def _is_per_layer(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count > 2


def _chosen_layers(config: PreTrainedConfig, count: int) -> list[int]:
    """Indices of at least two layers that between them show every kind of layer of the configuration."""
    per_layer = [
        list(value)
        for value in vars(config).values()
        if _is_per_layer(value, count)
        and all(isinstance(item, (str, int, float)) for item in value)
    ]
    chosen = {
        kinds.index(kind) for kinds in per_layer if len(set(kinds)) <= 4 for kind in set(kinds)
    }
    for index in range(count):
        if len(chosen) >= 2:
            break
        chosen.add(index)
    return sorted(chosen)


def _small_sections(rope: Any, pairs: int) -> Any:
    """Multimodal rotary sections, reduced in proportion so that they sum to `pairs` again."""
    if not isinstance(rope, dict):
        return rope
    if (sections := rope.get("mrope_section")) is None:
        return {name: _small_sections(value, pairs) for name, value in rope.items()}
    pairs = int(pairs * rope.get("partial_rotary_factor", 1.0))
    small = [pairs * section // sum(sections) for section in sections]
    for index in range(pairs - sum(small)):
        small[-1 - index] += 1
    return {**rope, "mrope_section": small}


def shrink(
    config: PreTrainedConfig,
    overrides: dict[str, Any] | None = None,
    token_ids: TokenIds | None = None,
) -> PreTrainedConfig:
    """Return a tiny configuration of the same class.

    `overrides` maps field names to values, a nested dict goes to the sub-configuration of that
    name. A field that the class derives from others (declared with default None) is derived again,
    from the small values.
    """
    overrides = dict(overrides or {})
    token_ids = token_ids or TokenIds()
    fields = type(config).__dataclass_fields__
    count_name = next((name for name in _LAYER_COUNTS if _is_int(vars(config).get(name))), "")
    count = vars(config).get(count_name, 0)
    chosen = _chosen_layers(config, count)
    stages = list(vars(config).get("_out_indices") or ())
    if (
        stages and count_name == "num_hidden_layers"
    ):  # a plain backbone: one layer for each feature map
        chosen = list(range(max(2, len(stages))))
        stages = [len(chosen) - index for index in reversed(range(len(stages)))]
    try:
        default = vars(type(config)())
    except Exception:  # no defaults: then every value counts as given
        default = {}
    stored = {kept: name for name, kept in type(config).attribute_map.items() if name in fields}
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        name = stored.get(name, name)
        if isinstance(value, PreTrainedConfig):
            nested = overrides.pop(name, None)
            small[name] = (
                nested if isinstance(nested, PreTrainedConfig) else shrink(value, nested, token_ids)
            )
            continue
        if name not in fields or name.startswith("_"):
            continue
        derived = fields[name].default is None and value == default.get(name)
        if name == count_name and count > 0:
            small[name] = len(chosen)
        elif _is_per_layer(value, count):
            kept = type(value)(value[index] for index in chosen)
            if not derived or len(set(map(str, value))) > 1:
                rule = _rule(name)
                small[name] = _map(kept, rule) if rule and "layer" not in name else kept
        elif _TOKEN_ID.search(name):
            small[name] = _map(value, token_ids)
        elif name in _FLOATS and value is not None:
            small[name] = _FLOATS[name]
        elif (rule := _rule(name)) is not None and not (derived and _DERIVED_AGAIN.search(name)):
            small[name] = _map(value, rule)
        elif not derived:
            small[name] = value
    if "kv_lora_rank" in small and "num_key_value_heads" in small:  # latent attention has no groups
        small["num_key_value_heads"] = small["num_attention_heads"]
    if vars(config).get("num_key_value_heads", 0) is None:
        small["num_key_value_heads"] = 2
    if (
        "head_dim" in fields
        and vars(config).get("head_dim") is None
        and "num_attention_heads" in small
    ):
        small["head_dim"] = small["hidden_size"] // small["num_attention_heads"]
    head_dim = small.get("head_dim") or 16
    if "rope_parameters" in fields:
        small["rope_parameters"] = _small_sections(
            small.get("rope_parameters", config.rope_parameters), head_dim // 2
        )
        if (
            small["rope_parameters"] == config.rope_parameters
            and fields["rope_parameters"].default is None
        ):
            del small["rope_parameters"]
    if stages:
        small["out_indices"] = stages
    changed = {
        name: value
        for name, value in small.items()
        if isinstance(value, PreTrainedConfig) or name not in default or value != default[name]
    }
    return type(config)(**(changed | overrides))
