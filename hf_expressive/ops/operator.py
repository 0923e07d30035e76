"""Functions as operators of `torch.library`, with little time of the host a call.

`torch.library.custom_op` does the same, but its wrapper reads the operator's schema anew at every call.
With the two dozen arguments of attention that took 0.2 to 1 ms (PyTorch 2.11), longer than the kernels
of a small layer. Here the schema is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library.custom_ops import get_library_allowing_overwrite
from torch.autograd import forward_ad

#: Of the operators' names. A copy of these files in a kernel repository has another, so that both can be
#: loaded in one process.
_NAMESPACE = __name__.partition(".")[0]


def operator(
    name: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[[Any, Sequence[Any], Any], None] | None = None,
    gradients: Callable[..., Any] | None = None,
) -> Any:
    """Registers `compute`, whose annotations give the schema, for every device.

    Args:
        name: of the operator.
        compute: takes positional arguments without defaults, the first a tensor on whose device it runs,
            writes to none and returns new tensors.
        fake: the same with tensors that have a shape only.
        save: save(context, inputs, output) keeps what the gradients need; `None` if there are none.
        gradients: gradients(context, *grad_outputs) returns one for each input, or `None` in its place.

    Returns:
        The operator, called like `compute`.
    """
    # Also where this file is imported for the second time, as a notebook may do.
    library = get_library_allowing_overwrite(_NAMESPACE, name)
    schema = torch.library.infer_schema(compute, mutates_args=())
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def on_device(*inputs: Any) -> Any:
        # Triton launches on the current device, which need not be that of a model's part.
        with torch.cuda.device_of(inputs[0]):
            return compute(*inputs)

    # Called from a frame that `torch.compile` gave up on, they would be compiled piece by piece.
    library.impl(name, torch.compiler.disable(on_device), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
    overload = getattr(getattr(torch.ops, _NAMESPACE), name).default
    differentiable = torch.compiler.disable(_autograd(name, overload, save, gradients))
    library.impl(name, differentiable, "Autograd", with_keyset=True)
    return overload


def _autograd(name: str, overload: Any, save: Any, gradients: Any) -> Callable[..., Any]:
    """What runs in place of the operator where autograd looks on."""

    def below(keyset: Any, inputs: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Any, *inputs_and_keyset: Any) -> Any:
        *inputs, keyset = inputs_and_keyset
        output = below(keyset, inputs)
        if save is not None:
            save(ctx, inputs, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        if gradients is None:
            raise RuntimeError(
                f"no autograd formula is registered for {name}: it is itself the gradient of an "
                'operator. For second derivatives use impl="reference".'
            )
        return *gradients(ctx, *grads), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(keyset: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
            raise NotImplementedError(
                f'{name} has no forward-mode derivative; use impl="reference" for it.'
            )
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs, keyset)
        return below(keyset, inputs)

    return call


def _has_tangent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None
