"""Many small one-layer language models of one shape, trained at once as one.

A model of some thousand parameters leaves a GPU idle. Here the weights of R such models lie in stacks
with the replica in front, and their attention is one call with the heads of all of them. Adam works
element by element, and the sum of the replicas' losses has the gradient of each for its own weights:
every replica trains as it would alone.

R replicas, B sequences each, T tokens, H heads of size D, width W = H · D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from arguments import Attention, require
from torch import Tensor, nn
from torch.func import stack_module_state
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention, silu
from transformers import PreTrainedModel

from hf_expressive.attention.base import AttentionCall
from hf_expressive.registry import CHILD, MECHANISMS


class Stacked(nn.Module):
    """One-layer GPT-2 or Llama models with their weights in stacks.

    Args:
        models: the replicas, of one config; their weights are copied. One that occurs several times
            becomes several replicas.
        attention: their kind of attention.

    Raises:
        ValueError: another architecture, several layers, or a mechanism whose parameters belong to all
            heads in common.
    """

    def __init__(self, models: Sequence[PreTrainedModel], attention: Attention) -> None:
        super().__init__()
        self.config: Any = models[0].config
        require(
            self.config.model_type in ("gpt2", "llama") and self.config.num_hidden_layers == 1,
            "only GPT-2 and Llama of one layer can be stacked.",
        )
        distinct = list({id(model): model for model in models}.values())
        index = torch.tensor([[model is one for one in distinct].index(True) for model in models])
        weights, _ = stack_module_state(distinct)
        # A point is not allowed in the name of a parameter.
        self._names = {}
        self.mechanism = self._mechanism(attention, len(models), weights, index)
        for name, stack in weights.items():
            # The output's weights are the embedding's.
            if f".{CHILD}." not in name and name != "lm_head.weight":
                short = name.removeprefix("transformer.").removeprefix("model.")
                self._names[short.replace(".", "_")] = name
                values = stack.detach()[index].clone()
                self.register_parameter(short.replace(".", "_"), nn.Parameter(values))

    def _mechanism(
        self, attention: Attention, replicas: int, weights: dict[str, Tensor], index: Tensor
    ) -> nn.Module | None:
        """The mechanism with the heads of all replicas."""
        if attention.options is None:
            return None
        heads = self.config.num_attention_heads
        sizes: dict[str, Any] = {"heads": replicas * heads, "kv_heads": replicas * heads}
        if attention.implementation == "implicit_kernel":
            sizes["head_dim"] = self.config.hidden_size // heads
        module = MECHANISMS[attention.implementation].module(attention.options, layer=0, **sizes)
        for name, parameter in module.named_parameters():
            (stack,) = (w for key, w in weights.items() if key.endswith(f".{CHILD}.{name}"))
            require(
                parameter.shape == (replicas * heads, *stack.shape[2:]),
                f"--attention {attention.text}: its {name} belongs to all heads in common.",
            )
            with torch.no_grad():
                parameter.copy_(stack[index].flatten(0, 1))
        return module

    def replica(self, number: int) -> dict[str, Tensor]:
        """The weights of one replica by the names of its Transformers model."""
        own = {full: getattr(self, short)[number] for short, full in self._names.items()}
        embedding = "transformer.wte.weight" if self._is_gpt2 else "model.embed_tokens.weight"
        own["lm_head.weight"] = own[embedding]
        if self.mechanism is not None:
            place = "transformer.h.0.attn" if self._is_gpt2 else "model.layers.0.self_attn"
            heads = self.config.num_attention_heads
            for name, value in self.mechanism.named_parameters():
                part = value[number * heads : (number + 1) * heads]
                own[f"{place}.{CHILD}.{name}"] = part
        return own

    @property
    def _is_gpt2(self) -> bool:
        return self.config.model_type == "gpt2"

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (R, B, T, vocabulary) for tokens (R, B, T)."""
        return self._gpt2(ids) if self._is_gpt2 else self._llama(ids)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """A linear layer of each replica; GPT-2 keeps its weights (in, out), Llama (out, in)."""
        weight = getattr(self, f"{name}_weight")
        if not self._is_gpt2:
            weight = weight.transpose(1, 2)
        flat = torch.bmm(x.flatten(1, 2), weight)
        if self._is_gpt2:
            flat = flat + getattr(self, f"{name}_bias").unsqueeze(1)
        return flat.unflatten(1, x.shape[1:3])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = getattr(self, f"{name}_weight")[:, None, None]
        if self._is_gpt2:
            normal = layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_epsilon)
            return normal * weight + getattr(self, f"{name}_bias")[:, None, None]
        return rms_norm(x, x.shape[-1:], eps=self.config.rms_norm_eps) * weight

    def _embed(self, ids: Tensor, table: Tensor) -> Tensor:
        # A product: the gradient of a lookup adds hundreds of thousands of rows to a few dozen.
        symbols = torch.arange(table.shape[1], device=ids.device)
        chosen = (ids.flatten(1).unsqueeze(-1) == symbols).to(table.dtype)
        return torch.bmm(chosen, table).unflatten(1, ids.shape[1:])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of (R, B, T, W) each, all heads of all replicas in one call."""
        heads = self.config.num_attention_heads
        replicas = query.shape[0]

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)

        query, key, value = split(query), split(key), split(value)
        if not self._is_gpt2:
            query, key = (
                _rotate(x, self.config.rope_parameters["rope_theta"]) for x in (query, key)
            )
        if self.mechanism is None:
            out = scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            call = AttentionCall(
                query,
                key,
                value,
                scaling=query.shape[-1] ** -0.5,
                is_causal=True,
                # A few dozen keys: all scores at once are less work than tiles.
                impl="reference",
            )
            out = self.mechanism(call)[0].to(query.dtype)
        return out.unflatten(1, (replicas, heads)).permute(1, 0, 3, 2, 4).flatten(-2)

    def _gpt2(self, ids: Tensor) -> Tensor:
        x = self._embed(ids, self.wte_weight) + self.wpe_weight[:, None, : ids.shape[-1]]
        query, key, value = self._linear(self._norm(x, "h_0_ln_1"), "h_0_attn_c_attn").chunk(3, -1)
        x = x + self._linear(self._attend(query, key, value), "h_0_attn_c_proj")
        hidden = self._linear(self._norm(x, "h_0_ln_2"), "h_0_mlp_c_fc")
        x = x + self._linear(gelu(hidden, approximate="tanh"), "h_0_mlp_c_proj")
        return self._logits(self._norm(x, "ln_f"), self.wte_weight)

    def _llama(self, ids: Tensor) -> Tensor:
        x = self._embed(ids, self.embed_tokens_weight)
        normal = self._norm(x, "layers_0_input_layernorm")
        query, key, value = (
            self._linear(normal, f"layers_0_self_attn_{part}_proj") for part in "qkv"
        )
        x = x + self._linear(self._attend(query, key, value), "layers_0_self_attn_o_proj")
        normal = self._norm(x, "layers_0_post_attention_layernorm")
        gate = silu(self._linear(normal, "layers_0_mlp_gate_proj"))
        hidden = gate * self._linear(normal, "layers_0_mlp_up_proj")
        x = x + self._linear(hidden, "layers_0_mlp_down_proj")
        return self._logits(self._norm(x, "norm"), self.embed_tokens_weight)

    def _logits(self, x: Tensor, table: Tensor) -> Tensor:
        flat = torch.bmm(x.flatten(1, 2), table.transpose(1, 2))
        return flat.unflatten(1, x.shape[1:3])


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions, as Llama's: halves of a head are the two coordinates of its planes."""
    length, dim = x.shape[-2:]
    frequency = theta ** -(torch.arange(0, dim, 2, device=x.device) / dim)
    angle = torch.outer(torch.arange(length, device=x.device), frequency)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
