"""Expressive attention in an attention module: options, the learned gain, the call."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..config import ExpressiveConfig, MechanismConfig
from ..ops.response import Response
from .base import AttentionCall, Mechanism


class HeadGain(nn.Module):
    """One positive factor a head, exp(log_gain), (heads,): 1 at the start, float32 in any model.

    A module of its own, because PEFT and offloading work on modules.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.empty(heads))

    def forward(self) -> Tensor:
        return self.log_gain.float().exp()


class ExpressiveAttention(Mechanism):
    """Weights z²ⁿ / (1 + z²ⁿ) with z = scale · q·k, row-normalised.

    With `scale="learned"` it owns a `HeadGain`: scale = scaling · gain, which starts at the module's
    scaling and stays positive.

    Raises:
        ValueError: a learned gain for a module whose number of heads cannot be found.
    """

    def __init__(
        self, options: MechanismConfig, *, layer: int, heads: int | None, kv_heads: int | None
    ) -> None:
        super().__init__(options, layer=layer, heads=heads, kv_heads=kv_heads)
        options = cast(ExpressiveConfig, options)
        self.scale = options.scale
        self.response = Response("hill", power=options.power)
        if options.scale == "learned" and not self.softmax_layer:
            if heads is None:
                raise ValueError(
                    "scale='learned' needs the number of heads, and this architecture's attention "
                    "module does not tell it; use scale='module' or a number."
                )
            self.gain = HeadGain(heads)

    def evaluate(self, call: AttentionCall, heads: slice) -> tuple[Tensor, Tensor | None]:
        scale: float | Tensor
        if self.scale == "module":
            scale = call.scaling
        elif self.scale == "learned":
            scale = self.gain()[heads] * call.scaling
        else:
            scale = self.scale
        return call.attend(self.response, scale)

    def reset_parameters(self) -> None:
        if self.has_parameters:
            init.zeros_(self.gain.log_gain)
