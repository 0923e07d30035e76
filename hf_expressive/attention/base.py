"""What every mechanism shares: one attention call, the child module that answers it, hybrids."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..config import MechanismConfig
from ..discovery import AttentionModule, num_heads, num_key_value_heads
from ..ops import KeyRanges
from ..ops.functional import Implementation, attend
from ..ops.response import Response


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, every keyword of the model brought into the ops' terms.

    Args:
        query: (batch, heads, query, dim).
        key: (batch, key/value heads, keys, dim).
        value: (batch, key/value heads, keys, value dim).
        scaling: the attention module's factor of q·k.
        attention_mask, bias, is_causal, sliding_window, softcap, sinks, dropout: as
            `hf_expressive.ops.expressive_attention`.
        return_weights: whether the weights (batch, heads, query, keys) are wanted too.
        impl: implementation, see `hf_expressive.ops.functional`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    attention_mask: Tensor | KeyRanges | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    return_weights: bool = False
    impl: Implementation = "auto"

    def heads(self, heads: slice) -> AttentionCall:
        """The same call for some of the query heads (whole groups)."""
        group = self.query.shape[1] // self.key.shape[1]
        shared = slice(heads.start // group, heads.stop // group)

        def cut(tensor: Tensor | None, dim: int = 1) -> Tensor | None:
            if tensor is None or tensor.shape[dim] == 1:
                return tensor
            return tensor[heads] if dim == 0 else tensor[:, heads]

        mask = self.attention_mask
        return dataclasses.replace(
            self,
            query=self.query[:, heads],
            key=self.key[:, shared],
            value=self.value[:, shared],
            attention_mask=cut(mask) if isinstance(mask, Tensor) else mask,
            bias=cut(self.bias),
            sinks=None if self.sinks is None else cut(self.sinks, self.sinks.dim() == 4),
        )

    def attend(
        self, response: Response, scale: float | Tensor, key_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluates the call with a response and a scale; output and, if wanted, the weights."""
        options = {
            "response": response,
            "scale": scale,
            "key_bias": key_bias,
            "attention_mask": self.attention_mask,
            "bias": self.bias,
            "is_causal": self.is_causal,
            "sliding_window": self.sliding_window,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "dropout": self.dropout,
            "impl": self.impl,
        }
        if self.return_weights:
            out, weights = attend(self.query, self.key, self.value, return_weights=True, **options)  # type: ignore[call-overload]
            return out, weights.to(self.query.dtype)
        return attend(self.query, self.key, self.value, **options), None  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class About:
    """A mechanism in words, for readers of a model card; Markdown, `formula` apart.

    Args:
        name: in running text.
        explanation: what it does instead of softmax attention.
        formula: lines of plain text.
        options: what the names of its options mean.
        source: the paper.
    """

    name: str
    explanation: str
    formula: str
    options: str
    source: str


#: The response of softmax attention.
SOFTMAX = Response("exp")


class Mechanism(nn.Module, ABC):
    """The child of an attention module that computes its attention and holds its learned parameters.

    A subclass says in `about` what it is, and in `response` how a score becomes a weight.

    Args:
        options: validated options.
        layer: index of the attention module's layer in its model.
        heads: query heads of the attention module, `None` where unknown.
        kv_heads: key/value heads, `None` where unknown.

    Raises:
        ValueError: options that do not fit the attention module.
    """

    about: ClassVar[About]
    response: Response

    def __init__(
        self, options: MechanismConfig, *, layer: int, heads: int | None, kv_heads: int | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = heads
        self.softmax_layer = layer in options.softmax_layers
        self.softmax_heads = options.softmax_heads
        if heads is not None and kv_heads is not None:
            _check_softmax_heads(self.softmax_heads, heads, kv_heads)

    @classmethod
    def of(cls, options: MechanismConfig, found: AttentionModule) -> Self:
        """The child for an attention module, its sizes read off the module; parameters are not set."""
        return cls(
            options,
            layer=found.layer,
            heads=num_heads(found.module),
            kv_heads=num_key_value_heads(found.module),
        )

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Output (batch, heads, query, value dim) and, if wanted, the weights."""
        heads = call.query.shape[1]
        if self.num_heads is not None and heads != self.num_heads and self.has_parameters:
            raise ValueError(
                f"the {type(self).__name__} of layer {self.layer} has parameters for "
                f"{self.num_heads} heads, but was called with {heads}."
            )
        if self.softmax_layer:
            return softmax_attention(call)
        if self.softmax_heads == 0:
            return self.evaluate(call, slice(0, heads))
        _check_softmax_heads(self.softmax_heads, heads, call.key.shape[1])
        ours = slice(self.softmax_heads, heads)
        softmax_out, softmax_weights = softmax_attention(call.heads(slice(0, self.softmax_heads)))
        if self.softmax_heads == heads:
            return softmax_out, softmax_weights
        out, weights = self.evaluate(call.heads(ours), ours)
        # Heads within positions: the order in which models go on.
        parts = (softmax_out.transpose(1, 2), out.transpose(1, 2))
        out = torch.cat(parts, dim=2).transpose(1, 2)
        if weights is not None and softmax_weights is not None:
            weights = torch.cat([softmax_weights, weights], dim=1)
        return out, weights

    @property
    def has_parameters(self) -> bool:
        return next(self.parameters(), None) is not None

    @abstractmethod
    def evaluate(self, call: AttentionCall, heads: slice) -> tuple[Tensor, Tensor | None]:
        """The mechanism for the query heads `heads` of the module, which `call` holds."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialises what the child owns with `transformers.initialization`.

        These functions skip parameters that were loaded from a checkpoint.
        """


def softmax_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Ordinary softmax attention with everything that a call may carry; for hybrid models."""
    return call.attend(SOFTMAX, call.scaling)


def _check_softmax_heads(softmax_heads: int, heads: int, kv_heads: int) -> None:
    group = heads // kv_heads
    if softmax_heads > heads or softmax_heads % group != 0:
        raise ValueError(
            f"softmax_heads must be a multiple of {group} (the query heads that share one key/value "
            f"head) up to {heads}, got {softmax_heads}."
        )
