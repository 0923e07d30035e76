"""What training needs beside the forward pass: the regulariser, and names for PEFT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention.base import Mechanism
from .attention.implicit_kernel import ImplicitKernelAttention
from .registry import CHILD


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The regulariser of a model's noise densities, to be added to its loss.

        Σ_layers [ kl_weight · Σ KL(noise ‖ prior) + copula_weight · mutual information of the heads ]

    Summed over layers, heads and dimensions, averaged over the batch; the weights are those of
    `ImplicitKernelConfig`. It belongs to one data set as a whole: the authors divide it by the number
    of training samples, so that the sum over an epoch counts it once.

    It is what the latest forward pass left behind, so call it after each forward pass and add it to
    that pass's loss: under gradient accumulation to each micro-batch, under data parallelism in each
    process, wrapped or not. Gradients reach the densities, and through their conditioning queries and
    keys.

    Args:
        model: a model, or a wrapper around one.

    Returns:
        A scalar, float32 or wider; zero, and still differentiable, for models without such densities.

    Raises:
        RuntimeError: a model with such densities that has not run yet.
    """
    noisy = [
        module
        for module in model.modules()
        if isinstance(module, ImplicitKernelAttention)
        and module.options.generates_frequencies
        and module.has_parameters
    ]
    terms = [module.regularizer for module in noisy if module.regularizer is not None]
    if noisy and not terms:
        raise RuntimeError(
            "auxiliary_loss(model) is computed during the forward pass; call it after model(…), on the "
            "loss of that pass."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    for term in terms:
        total = total + term.to(device)
    return total


def modules_to_save(model: nn.Module) -> list[str]:
    """Names for PEFT's `modules_to_save`: the modules that hold a model's mechanism parameters.

    With them an adapter trains and stores these parameters in full, beside its low-rank updates of the
    model's own layers; merging the updates leaves them as they are.

    Args:
        model: a model with a mechanism, before PEFT has wrapped it.

    Returns:
        Names such as `"mechanism.kernel"`; empty if no mechanism has learned parameters.

    Raises:
        ValueError: parameters that PEFT cannot save, because they belong to no module of their own.
    """
    names: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Mechanism):
            continue
        bare = [key for key, _ in module.named_parameters(recurse=False)]
        if bare:
            raise ValueError(
                f"PEFT saves modules, and {name}.{bare[0]} is a parameter of the mechanism itself; "
                "train this mechanism without modules_to_save, or choose options without it."
            )
        names |= {
            f"{CHILD}.{key}"
            for key, child in module.named_children()
            if next(child.parameters(), None) is not None
        }
    return sorted(names)
