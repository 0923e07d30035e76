"""Looking at trained mechanisms: spectral densities, kernels, weight on antiparallel pairs, plots.

Numbers come as tensors by attention module; each plot takes such numbers and returns a matplotlib
`Figure` (`pip install hf-expressive[recipes]`), with a row a layer and a line or panel a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention.base import AttentionCall, Mechanism
from .attention.implicit_kernel import ImplicitKernelAttention
from .ops.spectral import spectral_kernel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def spectral_samples(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Frequencies of every layer with a learned spectral density: samples of that density.

    Args:
        model: a model with implicit kernel attention. It is run once, in evaluation mode.
        inputs: keyword arguments of the forward pass; the density of a conditioned kernel is that of
            the first sequence of the batch.

    Returns:
        {mechanism path: (key/value heads, S, dim, M)}, in cycles per unit length, on the CPU.

    Raises:
        ValueError: no layer has a learned spectral density.
    """
    samples: dict[str, Tensor] = {}

    def visit(name: str, module: Mechanism, call: AttentionCall) -> None:
        if not isinstance(module, ImplicitKernelAttention) or module.kernel is None:
            return
        # Hybrid layers hand only their other heads to the kernel.
        ours = call.heads(slice(module.softmax_heads, call.query.shape[1]))
        frequencies = module.kernel(ours)[0]
        if frequencies is not None:
            first = frequencies[0] if frequencies.dim() == 5 else frequencies
            # A copy: learned frequencies are the parameter itself.
            samples[name] = first.detach().float().cpu().clone()

    _visit_calls(model, inputs, visit)
    if not samples:
        raise ValueError(
            f"{type(model).__name__} has no layer with a learned spectral density (kernel='stationary', "
            "'direct', 'implicit' or 'copula')."
        )
    return samples


def kernel_profile(
    frequencies: Tensor,
    direction: Tensor,
    distances: Tensor,
    *,
    origin: Tensor | None = None,
) -> Tensor:
    """The kernel along a line: k(x, x + δu) for each head.

    Args:
        frequencies: (heads, S, dim, M), e.g. from `spectral_samples`.
        direction: u, (dim,), any length but 0; it is normalised.
        distances: δ, (points,).
        origin: x, (dim,); the zero vector by default. A stationary kernel does not depend on it.

    Returns:
        (heads, points).

    Raises:
        ValueError: a direction or origin of another size, or a direction of length 0.
    """
    heads, _, dim, _ = frequencies.shape
    origin = torch.zeros(dim) if origin is None else origin
    if direction.shape != (dim,) or origin.shape != (dim,) or not direction.norm() > 0:
        raise ValueError(
            f"direction and origin must be vectors ({dim},), the direction not zero; got "
            f"{tuple(direction.shape)} and {tuple(origin.shape)}."
        )
    line = origin + distances[:, None] * (direction / direction.norm())
    points = line.to(frequencies).expand(1, heads, -1, -1)
    start = origin.to(frequencies).expand(1, heads, 1, dim)
    return spectral_kernel(start, points, frequencies)[0, :, 0]


def antiparallel_mass(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Share of attention weight on antiparallel pairs, q·k < 0, by layer and head.

    About one half for expressive attention that does not tell the two directions apart, near 0 for
    softmax attention. Takes memory O(query · keys) for one layer at a time.

    Args:
        model: a model with any mechanism. It is run once, in evaluation mode.
        inputs: keyword arguments of the forward pass.

    Returns:
        {mechanism path: (heads,)}, mean over the rows that see something, on the CPU.

    Raises:
        ValueError: the model carries no mechanism.
    """
    masses: dict[str, Tensor] = {}

    def visit(name: str, module: Mechanism, call: AttentionCall) -> None:
        # `forward`, not the module: calling that would visit it again.
        _, weights = module.forward(dataclasses.replace(call, impl="auto", return_weights=True))
        assert weights is not None
        weights = weights.float()
        group = call.query.shape[1] // call.key.shape[1]
        key = call.key.repeat_interleave(group, dim=1)
        antiparallel = torch.matmul(call.query.float(), key.float().transpose(-1, -2)) < 0
        total = weights.sum(dim=-1)
        share = (weights * antiparallel).sum(dim=-1) / torch.where(total > 0, total, 1.0)
        rows = (total > 0).sum(dim=(0, 2)).clamp_min(1)
        masses[name] = (share.sum(dim=(0, 2)) / rows).cpu()

    _visit_calls(model, inputs, visit)
    return masses


def plot_spectral_density(samples: Mapping[str, Tensor], *, bins: int = 16) -> Figure:
    """Histograms of the frequencies' lengths ‖w‖: a row a layer, a panel a head, a colour a density.

    All panels share their bins, from 0 to the greatest length.

    Args:
        samples: from `spectral_samples`.
        bins: bins a histogram.
    """
    heads = max(frequencies.shape[0] for frequencies in samples.values())
    greatest = max(float(frequencies.norm(dim=2).max()) for frequencies in samples.values())
    figure = _figure(len(samples), heads)
    for row, (name, frequencies) in enumerate(samples.items()):
        for head, densities in enumerate(frequencies):
            axes = figure.add_subplot(len(samples), heads, row * heads + head + 1)
            for s, lengths in enumerate(densities.norm(dim=1).tolist()):
                axes.hist(
                    lengths,
                    bins=bins,
                    range=(0.0, greatest),
                    histtype="step",
                    label=f"density {s + 1}",
                )
            _label(axes, f"{name}, head {head}", "‖w‖, cycles", "frequencies")
    figure.axes[0].legend()
    return figure


def plot_kernels(
    samples: Mapping[str, Tensor],
    *,
    direction: Tensor | None = None,
    largest: float = 8.0,
    points: int = 200,
) -> Figure:
    """The kernel k(0, δu) along a direction u: a panel a layer, a line a head.

    A dotted line shows exp(−δ²/(4√d)), whose square is the RBF kernel of softmax attention.

    Args:
        samples: from `spectral_samples`.
        direction: u, (dim,); by default the diagonal (1, …, 1).
        largest: δ goes from −largest to largest.
        points: points a line.
    """
    figure = _figure(len(samples), 1)
    distances = torch.linspace(-largest, largest, points)
    for row, (name, frequencies) in enumerate(samples.items()):
        along = torch.ones(frequencies.shape[2]) if direction is None else direction
        axes = figure.add_subplot(len(samples), 1, row + 1)
        for head, profile in enumerate(kernel_profile(frequencies, along, distances)):
            axes.plot(distances.tolist(), profile.tolist(), label=f"head {head}")
        rbf = torch.exp(-distances.square() / (4.0 * math.sqrt(frequencies.shape[2])))
        axes.plot(distances.tolist(), rbf.tolist(), ":", color="0.5", label="softmax")
        _label(axes, name, "δ", "k(0, δu)")
    figure.axes[0].legend()
    return figure


def plot_antiparallel_mass(masses: Mapping[str, Tensor]) -> Figure:
    """The share of weight on antiparallel pairs as a map: a row a layer, a column a head.

    Args:
        masses: from `antiparallel_mass`.
    """
    heads = max(mass.shape[0] for mass in masses.values())
    figure = _figure(1, 1)
    axes = figure.add_subplot(1, 1, 1)
    rows = [mass.tolist() + [math.nan] * (heads - mass.shape[0]) for mass in masses.values()]
    image = axes.imshow(rows, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(masses)), labels=list(masses))
    axes.set_xticks(range(heads))
    for row, values in enumerate(rows):
        for head, value in enumerate(values):
            if not math.isnan(value):
                colour = "white" if value < 0.6 else "black"
                axes.text(head, row, f"{value:.2f}", ha="center", va="center", color=colour)
    _label(axes, "share of weight on q·k < 0", "head", "")
    figure.colorbar(image)
    return figure


def _figure(rows: int, columns: int) -> Figure:
    # Without pyplot: no global state, no display, no backend to choose.
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install hf-expressive[recipes]"
        ) from error
    return Figure(figsize=(2.0 + 3.0 * columns, 1.0 + 2.0 * rows), layout="constrained")


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="small")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _visit_calls(
    model: nn.Module,
    inputs: Mapping[str, Any],
    visit: Callable[[str, Mechanism, AttentionCall], None],
) -> None:
    """Runs the model once in evaluation mode and visits the call of every mechanism as it happens.

    Raises:
        ValueError: no mechanism ran.
    """
    visited = False
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Mechanism):

            def hook(child: nn.Module, args: tuple[AttentionCall], name: str = name) -> None:
                nonlocal visited
                visited = True
                assert isinstance(child, Mechanism)
                visit(name, child, args[0])

            handles.append(module.register_forward_pre_hook(hook))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not visited:
        raise ValueError(
            f"no mechanism of hf_expressive ran in {type(model).__name__}; attach one first."
        )
