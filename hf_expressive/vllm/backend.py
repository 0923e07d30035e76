"""Expressive attention over vLLM's paged key/value cache.

T: tokens of a step, of all requests one after the other; S: keys of all requests, likewise; H, G: query
and key/value heads; D: size of a head; N: tokens in a block.

A step writes its keys and values into the cache, gathers those that its requests see, and runs one call
of `expressive_attention` in which each query sees a range of them: prefill, chunks of it, decoding and
any mixture. Gathering costs one copy of the keys in use per layer and step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from ..config import ExpressiveConfig, read_section
from ..ops import KeyRanges, expressive_attention


def options_of_model(vllm_config: Any) -> ExpressiveConfig:
    """The options in the config of the model that is served.

    Raises:
        ValueError: another mechanism, or options that need more than a scale and a power.
    """
    section = getattr(vllm_config.model_config.hf_config, "hf_expressive", None)
    options = ExpressiveConfig() if section is None else read_section(section)
    if (
        not isinstance(options, ExpressiveConfig)
        or options.needs_parameters
        or options.softmax_layers
        or options.softmax_heads
    ):
        raise ValueError(
            "the vLLM plugin runs expressive attention with scale='module' or a number, without learned "
            f"gains or sinks and without softmax layers or heads; this checkpoint has {options}."
        )
    return options


@dataclass
class ExpressiveMetadata:
    """What a step is made of.

    Attributes:
        num_tokens: T; tensors may be longer, padded for compiled graphs.
        slots: where the new keys and values go, block · N + place, (T,).
        keys: where the keys in use lie, likewise, (S,).
        starts: of each query's request among the keys in use, (T,).
        positions: of each query within its request, (T,).
    """

    num_tokens: int
    slots: Tensor
    keys: Tensor
    starts: Tensor
    positions: Tensor


class ExpressiveMetadataBuilder(AttentionMetadataBuilder[ExpressiveMetadata]):
    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size: int = kv_cache_spec.block_size

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ExpressiveMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError("the vLLM plugin runs causal decoders only.")
        device = common.seq_lens.device
        tokens = common.num_actual_tokens
        lengths = common.seq_lens[: common.num_reqs].long()
        queries = common.query_start_loc[: common.num_reqs + 1].long().diff()
        requests = torch.arange(common.num_reqs, device=device)

        key_requests = torch.repeat_interleave(requests, lengths)
        key_starts = lengths.cumsum(0) - lengths
        place = torch.arange(len(key_requests), device=device) - key_starts[key_requests]
        blocks = common.block_table_tensor[key_requests, place // self.block_size].long()

        query_requests = torch.repeat_interleave(requests, queries)
        query_starts = queries.cumsum(0) - queries
        step = torch.arange(len(query_requests), device=device) - query_starts[query_requests]
        return ExpressiveMetadata(
            num_tokens=tokens,
            slots=common.slot_mapping[:tokens],
            keys=blocks * self.block_size + place % self.block_size,
            starts=key_starts[query_requests],
            positions=(lengths - queries)[query_requests] + step,
        )


class ExpressiveImpl(AttentionImpl[ExpressiveMetadata]):
    """One attention layer; the arguments are those that vLLM gives to every backend."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        options = options_of_model(get_current_vllm_config())
        refused = {
            "alibi_slopes": alibi_slopes,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            "attn_type": None if attn_type == AttentionType.DECODER else attn_type,
            "kv_cache_dtype": kv_cache_dtype if kv_cache_dtype.startswith(("fp8", "int")) else None,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"the vLLM plugin does not run {name}={value!r}.")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.kv_cache_dtype = kv_cache_dtype
        self.scale = scale if options.scale == "module" else float(options.scale)
        self.power = options.power
        self.sliding_window = sliding_window
        self.softcap = logits_soft_cap or None
        self.sinks = sinks

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: ExpressiveMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes the step's keys and values into the cache and its attention into `output`.

        Args:
            query: (≥ T, H, D). key, value: (≥ T, G, D).
            kv_cache: (blocks, G, N, 2D), keys before values.
            attn_metadata: `None` in vLLM's profiling run.
            output: (≥ T, H, D).
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the vLLM plugin does not quantise its output.")
        if attn_metadata is None:
            return output.fill_(0)
        step = attn_metadata
        tokens, block_size = step.num_tokens, kv_cache.shape[2]
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        place = step.slots // block_size, step.slots % block_size
        keys[place] = key[:tokens].to(keys.dtype)
        values[place] = value[:tokens].to(values.dtype)
        in_use = step.keys // block_size, step.keys % block_size

        end = step.starts + step.positions + 1
        start = step.starts
        if self.sliding_window is not None:
            start = torch.maximum(start, end - self.sliding_window)
        out = expressive_attention(
            query[:tokens].transpose(0, 1)[None],
            keys[in_use].to(query.dtype).transpose(0, 1)[None],
            values[in_use].to(query.dtype).transpose(0, 1)[None],
            scale=self.scale,
            power=self.power,
            attention_mask=KeyRanges(start[None].int(), end[None].int()),
            softcap=self.softcap,
            sinks=self.sinks,
        )
        output[:tokens] = out[0].transpose(0, 1)
        return output


class ExpressiveBackend(AttentionBackend):
    """The entry CUSTOM of vLLM's attention backends. Full CUDA graphs are not supported."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[ExpressiveImpl]:
        return ExpressiveImpl

    @staticmethod
    def get_builder_cls() -> type[ExpressiveMetadataBuilder]:
        return ExpressiveMetadataBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True
