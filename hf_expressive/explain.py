"""What runs where: the mechanism, its options and the implementation of every attention module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .attention.base import SOFTMAX, Mechanism
from .config import SECTION
from .discovery import (
    attention_modules,
    foreign_modules,
    head_dim,
    num_heads,
    num_key_value_heads,
    pooling_modules,
)
from .ops.functional import choose
from .ops.problem import AttentionProblem
from .patcher import implementation, runs
from .registry import CHILD, MECHANISMS, options_of

#: Positions of the call that an explanation speaks of: long, so that no kernel is out of the question.
_LENGTH = 16384


@dataclass(frozen=True, slots=True)
class LayerExplanation:
    """What one attention module runs.

    Attributes:
        name: path within the model.
        mechanism: mechanism, or the stock implementation's name, or `"its own"` where a module never
            asks for an implementation.
        softmax: `"all heads"`, the number of heads, or `"none"`: what stays softmax attention.
        parameters: number of learned parameters of the mechanism.
        implementation: what `impl="auto"` runs for a long causal call on the module's device.
    """

    name: str
    mechanism: str
    softmax: str
    parameters: int
    implementation: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Options and layers of a model; prints as a table."""

    title: str
    layers: tuple[LayerExplanation, ...]

    def __str__(self) -> str:
        header = ("attention module", "mechanism", "softmax", "parameters", "implementation")
        rows = [
            (row.name, row.mechanism, row.softmax, str(row.parameters), row.implementation)
            for row in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        return "\n".join([self.title, *lines])


def explain(model: PreTrainedModel) -> Explanation:
    """Tells for every attention module of a model what runs there.

    Args:
        model: any model, with or without a mechanism.

    Returns:
        The explanation; `print(explain(model))` shows it.
    """
    layers = []
    for found in attention_modules(model):
        name = runs(found)
        child = found.module._modules.get(CHILD)
        if name not in MECHANISMS or not isinstance(child, Mechanism):
            layers.append(LayerExplanation(found.name, name, "all heads", 0, "Transformers"))
            continue
        heads = str(child.softmax_heads) if child.softmax_heads else "none"
        layers.append(
            LayerExplanation(
                found.name,
                name,
                "all heads" if child.softmax_layer else heads,
                sum(parameter.numel() for parameter in child.parameters()),
                _implementation(found.module, child, model),
            )
        )
    for found in [*foreign_modules(model), *pooling_modules(model)]:
        layers.append(LayerExplanation(found.name, "its own", "all heads", 0, "Transformers"))
    mechanism = implementation(model)
    section = getattr(model.config, SECTION)
    title = f"{type(model).__name__}: {mechanism}"
    if section is not None or mechanism in MECHANISMS:
        title += f", {options_of(model.config, section['mechanism'] if section else mechanism)}"
    return Explanation(title, tuple(layers))


def _implementation(module: torch.nn.Module, child: Mechanism, model: PreTrainedModel) -> str:
    """What `auto` picks for a long causal call of this module's heads, device and dtype."""
    heads, dim = num_heads(module) or 1, head_dim(module) or 64
    kv_heads = num_key_value_heads(module) or heads
    parameter = next(module.parameters(), next(model.parameters()))
    query, key = (
        parameter.new_empty(1, count, 1, dim).expand(-1, -1, _LENGTH, -1)
        for count in (heads, kv_heads)
    )
    response = SOFTMAX if child.softmax_layer else child.response
    problem = AttentionProblem(
        query=query, key=key, value=key, response=response, scale=1.0, is_causal=True
    )
    return choose(problem, "auto")
