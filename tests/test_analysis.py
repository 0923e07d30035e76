"""The numbers of `analysis`, against models whose answer is known, and that its plots show them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import largest_error
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

from hf_expressive import analysis
from hf_expressive.attention.spectral_density import LearnedFrequencies
from hf_expressive.config import ExpressiveConfig, ImplicitKernelConfig, MechanismConfig

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "pad_token_id": 0,
}
IDS = torch.tensor([[5, 9, 22, 41, 3, 17, 8], [12, 4, 33, 50, 21, 6, 2]])
LAYERS = [f"model.layers.{layer}.self_attn.mechanism" for layer in range(2)]


def _llama(options: MechanismConfig) -> Any:
    return AutoModelForCausalLM.from_config(
        LlamaConfig(num_key_value_heads=2, **SIZES),
        attn_implementation=options.mechanism,
        hf_expressive=options,
    )


def test_spectral_samples_are_the_frequencies_of_each_layer() -> None:
    model = _llama(ImplicitKernelConfig(num_features=10)).train()
    samples = analysis.spectral_samples(model, input_ids=IDS)
    weights = [m.weight for m in model.modules() if isinstance(m, LearnedFrequencies)]
    assert list(samples) == LAYERS
    for sample, weight in zip(samples.values(), weights, strict=True):
        assert sample.shape == (2, 2, 8, 10)
        assert torch.equal(sample, weight)
    assert model.training


def test_spectral_samples_of_a_conditioned_kernel_are_those_of_the_first_sequence() -> None:
    model = AutoModel.from_config(
        BertConfig(**SIZES),
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel="copula", softmax_heads=1),
    )
    both = analysis.spectral_samples(model, input_ids=IDS)
    one = analysis.spectral_samples(model, input_ids=IDS[:1])
    other = analysis.spectral_samples(model, input_ids=IDS[1:])
    name = next(iter(both))
    assert both[name].shape == (3, 2, 8, 64)
    assert largest_error(both[name], one[name]) < 1e-5
    assert largest_error(both[name], other[name]) > 1e-4


def test_a_model_without_spectral_density_is_named() -> None:
    with pytest.raises(ValueError, match="has no layer with a learned spectral density"):
        analysis.spectral_samples(_llama(ImplicitKernelConfig(kernel="rbf")), input_ids=IDS)
    softmax = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    for function in (analysis.spectral_samples, analysis.antiparallel_mass):
        with pytest.raises(ValueError, match="no mechanism of hf_expressive ran"):
            function(softmax, input_ids=IDS)


def test_profile_of_a_single_frequency_is_a_cosine() -> None:
    frequencies = torch.zeros(2, 1, 3, 1)
    frequencies[0, 0, 1], frequencies[1, 0, 1] = 0.5, 1.0
    distances = torch.linspace(-2, 2, 9)
    direction = torch.tensor([0.0, 4.0, 0.0])
    profile = analysis.kernel_profile(frequencies, direction, distances)
    for head, frequency in enumerate((0.5, 1.0)):
        expected = torch.cos(2 * math.pi * frequency * distances)
        assert largest_error(profile[head], expected) < 1e-5
    away = analysis.kernel_profile(frequencies, direction, distances, origin=torch.ones(3))
    assert largest_error(away, profile) < 1e-5
    for bad in (torch.zeros(3), torch.ones(2)):
        with pytest.raises(ValueError, match="direction and origin"):
            analysis.kernel_profile(frequencies, bad, distances)


def test_profile_of_a_direct_kernel_depends_on_the_origin() -> None:
    frequencies = 0.2 * torch.randn(2, 2, 3, 6)
    line = torch.ones(3), torch.linspace(-2, 2, 9)
    moved = analysis.kernel_profile(frequencies, *line, origin=torch.ones(3))
    assert largest_error(moved, analysis.kernel_profile(frequencies, *line)) > 0.05


def _antiparallel_by_hand(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """From the weights that the model returns and the queries and keys of its layers."""
    scores = []

    def record(_: Any, args: tuple[Any]) -> None:
        call = args[0]
        scores.append(call.query @ call.key.repeat_interleave(2, dim=1).transpose(-1, -2))

    handles = [model.get_submodule(name).register_forward_pre_hook(record) for name in LAYERS]
    weights = model.eval()(input_ids=ids, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    pairs = zip(weights, scores, strict=True)
    return {
        name: ((weight * (score < 0)).sum(-1).mean(dim=(0, 2))).detach()
        for name, (weight, score) in zip(LAYERS, pairs, strict=True)
    }


@pytest.mark.parametrize(
    "options", [ExpressiveConfig(), ExpressiveConfig(softmax_heads=2), ImplicitKernelConfig()]
)
def test_antiparallel_mass_is_the_weight_where_the_product_is_negative(
    options: MechanismConfig,
) -> None:
    model = _llama(options)
    masses = analysis.antiparallel_mass(model, input_ids=IDS)
    expected = _antiparallel_by_hand(model, IDS)
    for name in LAYERS:
        assert masses[name].shape == (4,)
        assert largest_error(masses[name], expected[name]) < 1e-5


def test_expressive_heads_spend_more_on_antiparallel_pairs_than_softmax_heads() -> None:
    model = _llama(ExpressiveConfig(softmax_heads=2))
    with torch.no_grad():
        for name in LAYERS:
            attention = model.get_submodule(name.removesuffix(".mechanism"))
            attention.q_proj.weight.mul_(100.0)
            attention.k_proj.weight.mul_(10.0)
    for mass in analysis.antiparallel_mass(model, input_ids=IDS).values():
        assert float(mass[:2].mean()) < 0.2 < float(mass[2:].mean())


def test_plots_show_every_layer_and_head() -> None:
    pytest.importorskip("matplotlib")
    model = _llama(ImplicitKernelConfig(num_features=12))
    samples = analysis.spectral_samples(model, input_ids=IDS)

    density = analysis.plot_spectral_density(samples, bins=5)
    titles = [axes.get_title() for axes in density.axes]
    assert titles == [f"{name}, head {head}" for name in LAYERS for head in range(2)]
    assert all(len(axes.patches) == 2 for axes in density.axes)
    assert len({axes.get_xlim() for axes in density.axes}) == 1

    kernels = analysis.plot_kernels(samples, largest=2.0, points=11)
    assert [axes.get_title() for axes in kernels.axes] == LAYERS
    line = kernels.axes[1].lines[1]
    expected = analysis.kernel_profile(samples[LAYERS[1]], torch.ones(8), torch.linspace(-2, 2, 11))
    assert line.get_ydata() == pytest.approx(expected[1].tolist())
    rbf = kernels.axes[0].lines[2].get_ydata()
    assert rbf == pytest.approx((-(torch.linspace(-2, 2, 11) ** 2) / (4 * 8**0.5)).exp().tolist())
    along = analysis.plot_kernels(samples, direction=torch.eye(8)[0], largest=2.0, points=11)
    assert along.axes[1].lines[1].get_ydata() != pytest.approx(expected[1].tolist())

    masses = {"one": torch.tensor([0.1, 0.2]), "two": torch.tensor([0.3])}
    axes = analysis.plot_antiparallel_mass(masses).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.10", "0.20", "0.30"]
    image = axes.images[0].get_array()
    assert image is not None
    assert image.filled(math.nan).tolist()[0] == pytest.approx([0.1, 0.2])
    assert image.mask.tolist() == [[False, False], [False, True]]
