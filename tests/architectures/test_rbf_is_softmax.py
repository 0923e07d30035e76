"""The RBF kernel with p = 2 is softmax attention, on every architecture: converting loses nothing.

The sample runs always; `-m architectures` runs the others too (two minutes on one core).
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_contract import NAMES
from torch import Tensor

from hf_expressive import ImplicitKernelConfig, attach
from hf_expressive.attention.implicit_kernel import ImplicitKernelAttention

from .builder import architectures, build, parts
from .checks import run
from .exceptions import BOOLEAN_MASK, KEEP_EAGER, NO_PADDING, REFUSED
from .test_architectures import SAMPLE

TOLERANCE = 1e-5
#: Outputs at positions that see no key: exactly zero by contract, where softmax spreads evenly.
BLIND = {name: {".last_hidden_state"} for name in ("timesfm", "timesfm2_5")}
#: At the first seeds a single rounding of the weights moves the outputs by more than the tolerance.
STEADY_SEED = {"deimv2": 2}

ALWAYS = {*NAMES, *SAMPLE}


def _names() -> list[object]:
    supported = [
        name for name in [*architectures(), *parts()] if name not in {*REFUSED, *KEEP_EAGER}
    ]
    marks = {name: () if name in ALWAYS else (pytest.mark.architectures,) for name in supported}
    return [pytest.param(name, marks=marks[name], id=name) for name in supported]


# Models of Transformers warn about much that is not ours.
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("name", _names())
def test_rbf_kernel_is_softmax(name: str) -> None:
    # Where eager attention fails at the model's own boolean masks, sdpa is what softmax is.
    softmax = build(name, "sdpa" if name in BOOLEAN_MASK else "eager", STEADY_SEED.get(name, 0))
    converted = copy.deepcopy(softmax)
    attach(converted.model, ImplicitKernelConfig(kernel="rbf", p=2.0, norm_dropout=0.0))
    assert any(isinstance(m, ImplicitKernelAttention) for m in converted.model.modules())
    for padding in ("none",) if name in NO_PADDING else ("none", "right"):
        inputs = softmax.inputs(padding)
        expected, outputs = run(softmax, inputs), run(converted, inputs)
        assert outputs.keys() == expected.keys()
        for output in expected.keys() - BLIND.get(name, set()):
            ours = _visible(outputs[output], inputs.get("attention_mask"))
            theirs = _visible(expected[output], inputs.get("attention_mask"))
            assert torch.equal(ours.isfinite(), theirs.isfinite()), output
            ours, theirs = ours[ours.isfinite()], theirs[theirs.isfinite()]
            # Some models write the dtype's minimum where there is no prediction.
            size = theirs[theirs.abs() < 1e30].abs().max() if theirs.numel() else 0.0
            assert ((ours - theirs).abs() <= TOLERANCE * size).all(), (padding, output)


def _visible(output: Tensor, mask: Tensor | None) -> Tensor:
    """The part of an output that belongs to visible tokens."""
    if mask is not None and output.shape[: mask.dim()] == mask.shape:
        return output[mask.bool()]
    return output
