"""Expressive attention in an attention module: options, learned gain and sink, the call."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..config import ExpressiveConfig, MechanismConfig
from ..ops.response import Response
from .base import About, AttentionCall, Mechanism


class HeadGain(nn.Module):
    """One positive factor a head, exp(log_gain), (heads,), float32 in any model.

    A module of its own, because PEFT and offloading work on modules.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.empty(heads))

    def forward(self) -> Tensor:
        return self.log_gain.float().exp()


class HeadSink(nn.Module):
    """The log-weight of one sink a head, (heads,), float32 in any model."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.empty(heads))

    def forward(self) -> Tensor:
        return self.log_weight.float()


class ExpressiveAttention(Mechanism):
    """Weights z²ⁿ / (1 + z²ⁿ) with z = scale · q·k, row-normalised.

    With `scale="learned"` it owns a `HeadGain`: scale = scaling · gain, which stays positive. With
    `sink=True` it owns a `HeadSink`, whose weight joins the row sum; where the model itself brings a
    sink, the two weights add.

    Raises:
        ValueError: learned parameters for a module whose number of heads cannot be found.
    """

    about = About(
        name="expressive attention",
        explanation=(
            "Softmax attention gives a key the more weight, the larger its product with the query "
            "is. Expressive attention squares the product: a long key that points along the query, "
            "or against it, gets a weight near 1, a key at a right angle to it none. The weights "
            "of a query are divided by their sum. A mask multiplies a weight by zero."
        ),
        formula=(
            "z_ij = scale · q_i·k_j\n"
            "w_ij = (z_ij²)^power / (1 + (z_ij²)^power)\n"
            "out_i = Σ_j w_ij v_j / Σ_j w_ij"
        ),
        options=(
            "`scale` is a number, `module` for the attention layer's own factor, or `learned` for that "
            "times a learned gain a head, which starts with `gain`. `sink` adds a learned number a head "
            "to the sum of the weights. `softmax_layers` and `softmax_heads` count what keeps softmax "
            "attention."
        ),
        source="C. Gros, [arXiv:2407.18601](https://arxiv.org/abs/2407.18601)",
    )

    def __init__(
        self, options: MechanismConfig, *, layer: int, heads: int | None, kv_heads: int | None
    ) -> None:
        super().__init__(options, layer=layer, heads=heads, kv_heads=kv_heads)
        self.options = options = cast(ExpressiveConfig, options)
        self.response = Response("hill", power=options.power)
        self.gain: HeadGain | None = None
        self.sink: HeadSink | None = None
        if not options.needs_parameters or self.softmax_layer:
            return
        if heads is None:
            raise ValueError(
                "scale='learned' and sink=True need the number of heads, and this architecture's "
                "attention module does not tell it; use scale='module' or a number, and no sink."
            )
        if options.scale == "learned":
            self.gain = HeadGain(heads)
        if options.sink:
            self.sink = HeadSink(heads)

    def evaluate(self, call: AttentionCall, heads: slice) -> tuple[Tensor, Tensor | None]:
        scale: float | Tensor
        if self.gain is not None:
            scale = self.gain()[heads] * call.scaling
        elif isinstance(self.options.scale, float):
            scale = self.options.scale
        else:
            scale = call.scaling
        if self.sink is not None:
            own = self.sink()[heads]
            if call.sinks is not None:
                given = call.sinks.float()
                own = torch.logaddexp(given, own if given.dim() == 1 else own[None, :, None, None])
            call = dataclasses.replace(call, sinks=own)
        return call.attend(self.response, scale)

    def reset_parameters(self) -> None:
        if self.gain is not None:
            init.constant_(self.gain.log_gain, math.log(self.options.gain))
        if self.sink is not None:
            init.zeros_(self.sink.log_weight)
