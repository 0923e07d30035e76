"""What training needs beside the forward pass: the regulariser, and names for PEFT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention.base import Mechanism
from .attention.spectral_density import Regularized
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

    With `Trainer`, three lines in a `compute_loss` of one's own. Where a model divides its loss by the
    tokens of all micro-batches, `Trainer` leaves their number out, so the second line brings it in:

        class RegularizedTrainer(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                if model.training:
                    parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
                    loss = loss + auxiliary_loss(model) / (parts * len(self.train_dataset))
                return (loss, outputs) if return_outputs else loss

    Args:
        model: a model, or a wrapper around one.

    Returns:
        A scalar, float32 or wider; zero, and still differentiable, for models without such densities.

    Raises:
        RuntimeError: a model with such densities that has not run yet, or whose latest pass in training
            mode had no gradients although some are wanted now: reentrant gradient checkpointing.
    """
    noisy = [
        module
        for module in model.modules()
        if isinstance(module, Regularized)
        and module.options.generates_frequencies
        and next(module.parameters(), None) is not None
    ]
    terms = [module.regularizer for module in noisy if module.regularizer is not None]
    if noisy and not terms:
        raise RuntimeError(
            "auxiliary_loss(model) is computed during the forward pass; call it after model(…), on the "
            "loss of that pass."
        )
    if torch.is_grad_enabled() and any(map(_has_lost_its_gradient, noisy)):
        raise RuntimeError(
            "auxiliary_loss(model) would train nothing: the latest forward pass ran without gradients, "
            "under torch.no_grad() or in reentrant gradient checkpointing. For the latter choose "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}); '
            "only to look at its value, call it under torch.no_grad(), too."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    for term in terms:
        total = total + term.to(device)
    return total


def _has_lost_its_gradient(module: Regularized) -> bool:
    regularizer = module.regularizer
    return (
        module.training
        and regularizer is not None
        and not regularizer.requires_grad
        and any(parameter.requires_grad for parameter in module.parameters())
    )


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
