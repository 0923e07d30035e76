"""Functions as operators of `torch.library`, with little time of the host a call.

`torch.library.custom_op` does the same, but its wrapper reads the operator's schema anew at every call.
With the two dozen arguments of attention that took 0.2 to 1 ms (PyTorch 2.11), longer than the kernels
of a small layer. Here the schema is read once; and where nothing looks on, no compiler, no mode, no
transform, no tensor of another class, the dispatcher, which translates the arguments four times, is
passed by, and on a GPU a call that looks like earlier ones is repeated from memory (`recording`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._library.custom_ops import get_library_allowing_overwrite
from torch.autograd import forward_ad

from .recording import Repeated

#: Of the operators' names. A copy of these files in a kernel repository has another, so that both can be
#: loaded in one process.
_NAMESPACE = __name__.partition(".")[0]
#: Of an operator's tensors where none is of another class.
_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None)}


def operator(
    name: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    gradients: Callable[..., Any] | None = None,
    saves_output: bool = False,
) -> Any:
    """Registers `compute`, whose annotations give the schema, for every device.

    Args:
        name: of the operator.
        compute: takes positional arguments without defaults: tensors, the first on the device where it
            runs, then options. Writes to none and returns new tensors. What it does depends on the
            options and on how its tensors look, not on what is in them.
        fake: the same with tensors that have a shape only.
        gradients: gradients(context, *grad_outputs) returns one for each tensor, or `None` in its place;
            `None` if the operator has none. `context.saved_tensors` are the tensors and, if wanted, the
            output, `context.options` the options. Of several outputs the first is differentiable.
        saves_output: whether the gradients need the output.

    Returns:
        The operator, or what comes to the same without the dispatcher; called like `compute`.
    """
    # Also where this file is imported for the second time, as a notebook may do.
    library = get_library_allowing_overwrite(_NAMESPACE, name)
    schema = torch.library.infer_schema(compute, mutates_args=())
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def on_device(*inputs: Any) -> Any:
        # Triton launches on the current device, which need not be that of a model's part.
        with torch.cuda.device_of(inputs[0]):
            return compute(*inputs)

    def evaluated(tensors: Sequence[Any], options: Sequence[Any]) -> Any:
        return on_device(*tensors, *options)

    # Called from a frame that `torch.compile` gave up on, they would be compiled piece by piece.
    library.impl(name, torch.compiler.disable(on_device), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
    overload = getattr(getattr(torch.ops, _NAMESPACE), name).default
    count = sum("Tensor" in str(argument.type) for argument in overload._schema.arguments)

    def below_autograd(keyset: Any, tensors: Sequence[Any], options: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            below = keyset & torch._C._after_autograd_keyset
            return overload.redispatch(below, *tensors, *options)

    run = _differentiable(name, gradients, saves_output=saves_output)

    def registered(keyset: Any, *inputs: Any) -> Any:
        return run(functools.partial(below_autograd, keyset), inputs[:count], inputs[count:])

    library.impl(name, torch.compiler.disable(registered), "Autograd", with_keyset=True)

    repeated = Repeated(compute, _settings)

    def on_gpu(tensors: Sequence[Any], options: Sequence[Any]) -> Any:
        if tensors[0].get_device() == torch.cuda.current_device():
            return repeated(tensors, options)
        with torch.cuda.device_of(tensors[0]):
            return repeated(tensors, options)

    def alone(tensors: Sequence[Any], options: Sequence[Any]) -> Any:
        return run(on_gpu if tensors[0].is_cuda else evaluated, tensors, options)

    uncompiled = torch.compiler.disable(alone)

    def call(*inputs: Any) -> Any:
        tensors = inputs[:count]
        if not _is_unobserved(tensors):
            return overload(*inputs)
        # `disable` costs a few microseconds also where no compiler is at work.
        direct = alone if get_eval_frame_callback() is None else uncompiled
        return direct(tensors, inputs[count:])

    return call


def _settings() -> Any:
    """What implementations look at besides their arguments."""
    return torch.backends.cuda.matmul.fp32_precision


def _is_unobserved(tensors: Sequence[Any]) -> bool:
    """Whether the dispatcher would do no more than call the function."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and {type(value) for value in tensors} <= _PLAIN_TYPES
    )


def _differentiable(name: str, gradients: Any, *, saves_output: bool) -> Callable[..., Any]:
    """run(function, tensors, options): function(tensors, options), with gradients where wanted."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, options, function = arguments
        output = function(tensors, options)
        if gradients is not None:
            ctx.save_for_backward(*tensors, *(output if saves_output else ()))
            ctx.options = options
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[1:])
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        if gradients is None:
            raise RuntimeError(
                f"no autograd formula is registered for {name}: it is itself the gradient of an "
                'operator. For second derivatives use impl="reference".'
            )
        return *gradients(ctx, *grads), None, None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    tracked: Any = type(name, (torch.autograd.Function,), methods)

    def run(function: Callable[..., Any], tensors: Sequence[Any], options: Sequence[Any]) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
            raise NotImplementedError(
                f'{name} has no forward-mode derivative; use impl="reference" for it.'
            )
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            return tracked.apply(*tensors, options, function)
        return function(tensors, options)

    return run


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
