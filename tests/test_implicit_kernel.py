"""Implicit kernel attention in Transformers models: contract, parameters, noise, options."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tolerances import LOGITS, largest_error
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

import hf_expressive
from hf_expressive.attention.implicit_kernel import (
    ImplicitKernelAttention,
    SpectralKernel,
    mean_query_and_key,
)
from hf_expressive.attention.spectral_density import GeneratedFrequencies, LearnedFrequencies
from hf_expressive.auxiliary import auxiliary_loss, modules_to_save
from hf_expressive.config import ExpressiveConfig, ImplicitKernelConfig, read_section
from hf_expressive.ops import implicit_kernel
from hf_expressive.verify import verify

KERNELS = ["rbf", "stationary", "direct", "implicit", "copula"]
NOISY = ["implicit", "copula"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "pad_token_id": 0,
}
IDS = torch.tensor([[5, 9, 22, 41, 3, 17, 8], [12, 4, 33, 50, 21, 6, 2]])


def _llama(
    kernel: str = "direct", *, heads: int = 2, dtype: torch.dtype | None = None, **options: Any
) -> Any:
    """A causal model, four query heads over `heads` key/value heads, in evaluation mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(num_key_value_heads=heads, **SIZES),
        dtype=dtype,
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel=kernel, **options),  # type: ignore[arg-type]
    ).eval()


def _bert(kernel: str = "direct", **options: Any) -> Any:
    """An encoder without hidden dropout, in evaluation mode."""
    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
    return AutoModel.from_config(
        config,
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel=kernel, **options),  # type: ignore[arg-type]
    ).eval()


def _t5(kernel: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=40, num_heads=4, num_layers=2, vocab_size=60, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0
    return AutoModelForSeq2SeqLM.from_config(
        config,
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel=kernel, **options),  # type: ignore[arg-type]
    ).eval()


def _mechanisms(model: torch.nn.Module) -> list[ImplicitKernelAttention]:
    return [module for module in model.modules() if isinstance(module, ImplicitKernelAttention)]


def _density(model: torch.nn.Module) -> GeneratedFrequencies:
    return next(module for module in model.modules() if isinstance(module, GeneratedFrequencies))


def _own(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the mechanisms."""
    return {k: v for k, v in model.state_dict().items() if ".mechanism." in k}


def _output(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs)[0]


def _train_a_little(model: Any, steps: int = 2) -> None:
    """Moves every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise.to(parameter.dtype))


# ---- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_causal_model_keeps_the_contract(kernel: str) -> None:
    """No future leak, padded = unpadded, cached = uncached, packed = separate, equal to float64."""
    report = verify(_llama(kernel, p="learned"))
    assert [check.passed for check in report.checks] == [True] * 7


@pytest.mark.parametrize("kernel", KERNELS)
def test_encoder_keeps_the_contract(kernel: str) -> None:
    report = verify(_bert(kernel, p=3.0))
    passed = {check.name: check.passed for check in report.checks}
    assert passed["every layer ran"]
    assert passed["exact"]
    assert passed["padded = unpadded"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_encoder_decoder_with_scaling_1_and_position_bias_keeps_the_contract(kernel: str) -> None:
    report = verify(_t5(kernel))
    passed = {check.name: check.passed for check in report.checks}
    assert passed["exact"]
    assert passed["no future leak"]
    assert passed["cached = uncached"]


def test_sinks_and_sliding_windows_keep_the_contract() -> None:
    config = GptOssConfig(num_key_value_heads=2, head_dim=8, num_local_experts=4, **SIZES)
    config.sliding_window = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="implicit_kernel", hf_expressive=ImplicitKernelConfig()
    )
    assert verify(model).passed


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_token_sees_a_later_one(kernel: str, training: bool) -> None:
    model = _llama(kernel).train(training)
    later = IDS.clone()
    later[:, 4:] = (later[:, 4:] + 11) % 60
    outputs = []
    for ids in (IDS, later):
        torch.manual_seed(3)
        outputs.append(_output(model, ids))
    assert largest_error(outputs[0][:, :4], outputs[1][:, :4]) == 0.0
    assert largest_error(outputs[0][:, 4:], outputs[1][:, 4:]) > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("build", [_llama, _bert])
def test_a_batch_is_its_sequences_one_by_one(build: Any, kernel: str) -> None:
    model = build(kernel)
    together = _output(model)
    apart = torch.cat([_output(model, row[None]) for row in IDS])
    assert largest_error(together, apart) < LOGITS


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_on_the_left_changes_nothing_in_an_encoder(kernel: str) -> None:
    model = _bert(kernel, condition="mean") if kernel in NOISY else _bert(kernel)
    pad = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(IDS)], dim=1)
    positions = torch.arange(10)[None] - 3
    positions = positions.clamp(min=0)
    padded = _output(
        model, torch.cat([pad, IDS], dim=1), attention_mask=mask, position_ids=positions
    )
    assert largest_error(padded[:, 3:], _output(model)) < LOGITS


@pytest.mark.parametrize("kernel", KERNELS)
def test_generation_is_the_same_with_and_without_a_cache(kernel: str) -> None:
    model = _llama(kernel)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))


def test_softcap_is_refused_unless_it_has_a_logit_to_cap() -> None:
    config = Gemma2Config(num_key_value_heads=2, head_dim=8, **SIZES)
    for kernel in ("rbf", "direct"):
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation="implicit_kernel",
            hf_expressive=ImplicitKernelConfig(kernel=kernel),  # type: ignore[arg-type]
        ).eval()
        if kernel == "rbf":
            assert _output(model).isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"softcap=50\.0 could cap"):
                _output(model)


def test_features_of_a_key_are_computed_once_for_its_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []
    original = implicit_kernel.spectral_features

    def spy(x: Tensor, frequencies: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return original(x, frequencies)

    monkeypatch.setattr(implicit_kernel, "spectral_features", spy)
    _output(_llama("direct"))
    assert sorted(shapes) == sorted([(2, 2, 14, 8), (2, 2, 7, 8)] * 2)


def test_autocast_leaves_frequencies_and_regulariser_alone() -> None:
    model = _bert("copula")
    _output(model)
    before = auxiliary_loss(model)
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    call = dataclasses.replace(_calls(model)[0], query=query, key=key)
    plain = _kernel(model)(call)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _kernel(model)(call)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert before.dtype == torch.float32


def _kernel(model: torch.nn.Module) -> SpectralKernel:
    return next(module for module in model.modules() if isinstance(module, SpectralKernel))


def _calls(model: Any, **inputs: Any) -> list[Any]:
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
        for module in _mechanisms(model)
    ]
    _output(model, **inputs)
    for handle in handles:
        handle.remove()
    return calls


# ---- from softmax checkpoints, to disk and back ------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, "learned"])
def test_rbf_kernel_starts_as_the_softmax_model(p: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=2, **SIZES)
    softmax = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    softmax.save_pretrained(tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel="rbf", p=p),
    ).eval()
    assert len(_mechanisms(converted)) == 2
    expected = _output(softmax)
    assert largest_error(_output(converted), expected) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_initialises_what_the_checkpoint_lacks(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    config = LlamaConfig(num_key_value_heads=2, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for kernel in KERNELS[1:]:
        options = ImplicitKernelConfig(kernel=kernel, p="learned")  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="implicit_kernel", hf_expressive=options, dtype=dtype
        )
        for kernel_module in (m for m in model.modules() if isinstance(m, SpectralKernel)):
            assert not kernel_module.log_exponent.any()
            density = kernel_module.density
            if isinstance(density, LearnedFrequencies):
                weight = density.weight.detach().float()
                assert float(weight.abs().max()) <= 8**-0.5 * 1.01
                assert float(weight.std()) == pytest.approx((3 * 8) ** -0.5, rel=0.1)
            else:
                assert isinstance(density, GeneratedFrequencies)
                assert float(density.log_variance.detach().float().exp().mean()) == pytest.approx(
                    0.01, rel=0.02
                )
                assert float(density.mean.detach().abs().max()) < 0.5
                assert float(density.sample.float().std()) == pytest.approx(1.0, rel=0.1)
                bound = max(float(p.detach().abs().max()) for p in density.generators.parameters())
                assert bound <= 8**-0.5 * 1.01
        assert _output(model).isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit(
    kernel: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = _llama(kernel, p="learned", authors_code=True, dtype=dtype)
    _train_a_little(model)
    model.save_pretrained(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["hf_expressive"]
    assert read_section(section) == ImplicitKernelConfig(
        kernel=kernel,  # type: ignore[arg-type]
        p="learned",
        authors_code=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == dtype
    own, again = _own(model), _own(loaded)
    assert own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in own)
    assert torch.equal(_output(loaded), _output(model))


def test_gaussian_start_is_near_the_softmax_model() -> None:
    """Deviation of the attention weights from softmax, ε aside, against the uniform start."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 12, 16, generator=generator).unbind(0)
    query, key = 0.5 * query, 0.5 * key
    softmax = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = {}
    for kernel in ("stationary", "direct"):
        for init in ("gaussian", "kaiming"):
            options = ImplicitKernelConfig(
                kernel=kernel,  # type: ignore[arg-type]
                init=init,  # type: ignore[arg-type]
                num_features=2048,
                epsilon=0.0,
            )
            density = LearnedFrequencies(options, 2, 16)
            density.reset_parameters()
            out = hf_expressive.ops.implicit_kernel_attention(
                query, key, value, frequencies=density.weight.detach(), epsilon=0.0
            )
            errors[kernel, init] = largest_error(out, softmax)
    assert errors["stationary", "gaussian"] < 0.1, errors
    assert errors["direct", "gaussian"] < 0.15, errors
    assert errors["stationary", "kaiming"] > 0.3, errors


def test_densities_of_the_direct_kernel_start_apart() -> None:
    density = LearnedFrequencies(ImplicitKernelConfig(init="gaussian"), 2, 16)
    density.reset_parameters()
    first, second = density.weight.detach().unbind(dim=1)
    assert 0.05 < float((first - second).std() / first.std()) < 0.3


@pytest.mark.parametrize("num_features", [3, 16, 40])
def test_orthogonal_frequencies_keep_the_gaussian_lengths(num_features: int) -> None:
    options = ImplicitKernelConfig(
        kernel="stationary", init="orthogonal", num_features=num_features
    )
    density = LearnedFrequencies(options, 50, 16)
    density.reset_parameters()
    weight = density.weight.detach()[:, 0]
    for block in weight.split(16, dim=-1):
        products = block.mT @ block
        beside = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
        assert float(beside.abs().max()) < 1e-6
    deviation = (2.0 * 16**0.5) ** -0.5 / (2.0 * torch.pi)
    lengths = weight.square().sum(dim=-2) / deviation**2
    assert float(lengths.mean()) == pytest.approx(16.0, rel=0.1)
    assert float(lengths.var()) == pytest.approx(32.0, rel=0.4)
    assert float(weight.mean()) == pytest.approx(0.0, abs=0.1 * deviation)


# ---- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("build", [_llama, _bert])
@pytest.mark.parametrize("softmax_heads", [0, 2])
def test_every_parameter_receives_a_gradient(build: Any, kernel: str, softmax_heads: int) -> None:
    if build is _llama and kernel == "copula" and softmax_heads:
        pytest.skip("one key/value head is left, and a copula needs two")
    model = build(kernel, p="learned", softmax_heads=softmax_heads, norm_dropout=0.0).train()
    _train_a_little(model)
    model(input_ids=IDS)[0].square().sum().backward()
    own = [(n, p) for n, p in model.named_parameters() if ".mechanism." in n]
    assert own
    for name, parameter in own:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Every head, every row of a weight.
        rows = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad
        assert bool(rows.any(dim=-1).all()), name


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointed_blocks_draw_the_same_noise_again() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _bert("copula").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(input_ids=IDS)[0].square().sum() + auxiliary_loss(model)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".mechanism." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


# ---- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", NOISY)
def test_noise_is_stored_for_evaluation_and_fresh_in_training(kernel: str) -> None:
    model = _bert(kernel, norm_dropout=0.0)
    assert torch.equal(_output(model), _output(model))
    model.train()
    assert largest_error(_output(model), _output(model)) > 1e-4


def test_stored_noise_depends_on_seed_and_layer_only() -> None:
    samples = [
        m.density.sample for m in _bert("implicit").modules() if isinstance(m, SpectralKernel)
    ]  # type: ignore[union-attr]
    assert not torch.equal(samples[0], samples[1])
    torch.manual_seed(99)
    again = AutoModel.from_config(
        BertConfig(**SIZES),
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel="implicit"),
    )
    assert torch.equal(_density(again).sample, samples[0])
    assert not torch.equal(_density(_bert("implicit", seed=7)).sample, samples[0])


def _generated(options: ImplicitKernelConfig, *, heads: int, dim: int) -> GeneratedFrequencies:
    """An initialised density in evaluation mode."""
    density = GeneratedFrequencies(options, heads, dim, conditional=False, layer=0)
    density.reset_parameters()
    return density.eval()


def _noise_only(density: GeneratedFrequencies) -> None:
    """Makes both generators the identity, μ = 0 and σ = 1: frequencies are the (coupled) noise."""
    with torch.no_grad():
        density.mean.zero_()
        density.log_variance.zero_()
        for name, parameter in density.generators.named_parameters():
            size = parameter.shape[0]
            parameter.copy_(torch.eye(size) if "weight" in name else torch.zeros(size))


@pytest.mark.parametrize("authors_code", [False, True])
def test_copula_couples_the_heads_as_its_matrix_says(authors_code: bool) -> None:
    options = ImplicitKernelConfig(kernel="copula", num_features=4000, authors_code=authors_code)
    density = _generated(options, heads=3, dim=4)
    _noise_only(density)
    with torch.no_grad():
        density.coupling.copy_(torch.tensor([1.5, -0.7, 0.4]))
        frequencies = density(None)[0]
    assert frequencies.shape == (3, 2, 4, 4000)
    noise = frequencies[:, 0].flatten(1)
    lower = torch.tensor([[1.0, 0, 0], [1.5, 1, 0], [-0.7, 0.4, 1]])
    covariance = lower @ lower.T
    scale = covariance.diagonal().rsqrt()
    correlation = covariance * scale[:, None] * scale
    ranks = torch.tensor(stats.spearmanr(noise.numpy(), axis=1).statistic)
    if authors_code:
        assert float((ranks - torch.eye(3)).abs().max()) < 0.03
        assert torch.allclose(noise.std(dim=1), lower.sum(dim=1).abs(), rtol=0.03)
    else:
        expected = 6 / torch.pi * torch.asin(correlation / 2)
        assert float((ranks - expected).abs().max()) < 0.02
        # The margins stay standard normal: that is what makes it a copula.
        for head in noise:
            assert stats.kstest(head.numpy(), "norm").statistic < 0.02


def test_half_of_the_noise_lies_around_each_sign_of_the_mean() -> None:
    density = _generated(ImplicitKernelConfig(kernel="implicit", num_features=4000), heads=2, dim=3)
    _noise_only(density)
    with torch.no_grad():
        density.mean.fill_(5.0)
        noise = density(None)[0][:, 1]
    assert torch.allclose(noise[..., :2000].mean(-1), torch.full((2, 3), 5.0), atol=0.1)
    assert torch.allclose(noise[..., 2000:].mean(-1), torch.full((2, 3), -5.0), atol=0.1)


def test_generators_are_odd() -> None:
    """Frequencies of mirrored noise are mirrored: the density is symmetric."""
    density = _generated(ImplicitKernelConfig(kernel="implicit"), heads=2, dim=3)
    with torch.no_grad():
        plus = density(None)[0]
        density.sample.neg_()
        density.mean.neg_()
        minus = density(None)[0]
    assert torch.equal(plus, -minus)
    assert float((plus[:, 0] - plus[:, 1]).abs().max()) > 0.01


def test_standard_deviation_is_the_root_of_the_variance_except_in_the_authors_code() -> None:
    for authors_code, expected in ((False, 0.5), (True, 0.25)):
        options = ImplicitKernelConfig(
            kernel="implicit", num_features=4000, authors_code=authors_code
        )
        density = _generated(options, heads=2, dim=3)
        _noise_only(density)
        with torch.no_grad():
            density.log_variance.fill_(torch.tensor(0.25).log())
            noise = density(None)[0][:, 0]
        assert float(noise.std()) == pytest.approx(expected, rel=0.03)


# ---- conditioning ---------------------------------------------------------------------------------


def test_auto_conditions_encoder_self_attention_only() -> None:
    assert all(k.conditional for k in _kernels(_bert("implicit")))
    assert not any(k.conditional for k in _kernels(_llama("implicit")))
    t5 = _t5("copula")
    assert [k.conditional for k in _kernels(t5.encoder)] == [True, True]
    assert [k.conditional for k in _kernels(t5.decoder)] == [False] * 4
    decoder = BertConfig(is_decoder=True, add_cross_attention=True, **SIZES)
    model = AutoModel.from_config(
        decoder,
        attn_implementation="implicit_kernel",
        hf_expressive=ImplicitKernelConfig(kernel="implicit"),
    )
    assert [k.conditional for k in _kernels(model)] == [False] * 4


def _kernels(model: torch.nn.Module) -> list[SpectralKernel]:
    return [module for module in model.modules() if isinstance(module, SpectralKernel)]


def test_constant_condition_does_not_look_at_the_sequence() -> None:
    for condition, differs in (("mean", True), ("constant", False)):
        model = _bert("implicit", condition=condition)
        frequencies = []
        for row in IDS:
            call = _calls(model, ids=row[None])[0]
            with torch.no_grad():
                frequencies.append(_kernel(model)(call)[0])
        assert (largest_error(*(f.reshape(-1) for f in frequencies)) > 1e-5) == differs


def test_means_are_taken_over_visible_positions_and_the_group() -> None:
    model = _bert("implicit")
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    call = _calls(model, attention_mask=mask)[0]
    mean = mean_query_and_key(call)
    assert mean.shape == (2, 4, 16)
    for row, length in ((0, 4), (1, 7)):
        expected = [x[row, :, :length].mean(dim=1) for x in (call.query, call.key)]
        assert largest_error(mean[row], torch.cat(expected, dim=-1)) < 1e-6
    dense = dataclasses.replace(
        call, attention_mask=mask.bool()[:, None, None].expand(-1, 1, 7, -1)
    )
    assert largest_error(mean_query_and_key(dense), mean) < 1e-6
    additive = (1.0 - mask[:, None, None].float()) * -1e9
    biased = dataclasses.replace(call, attention_mask=None, bias=additive)
    assert largest_error(mean_query_and_key(biased), mean) < 1e-6
    grouped = dataclasses.replace(call, key=call.key[:, ::2])
    expected_group = torch.stack(
        [call.query[1, :2].mean(dim=(0, 1)), call.query[1, 2:].mean(dim=(0, 1))]
    )
    assert largest_error(mean_query_and_key(grouped)[1, :, :8], expected_group) < 1e-6


def test_conditioning_on_the_mean_is_refused_where_queries_see_different_keys() -> None:
    with pytest.raises(ValueError, match="condition='constant'"):
        _output(_llama("implicit", condition="mean"))
    model = _bert("implicit")
    with pytest.raises(ValueError, match="condition='constant'"):
        _output(model, attention_mask=torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7))
    call = _calls(model)[0]
    for change in (
        {"is_causal": True},
        {"sliding_window": 3},
        {"query": call.query[:, :, :3]},
        {"bias": torch.zeros(1, 1, 7, 7).masked_fill(torch.eye(7).bool(), -torch.inf)},
    ):
        with pytest.raises(ValueError, match="do not all see the same keys"):
            mean_query_and_key(dataclasses.replace(call, **change))


# ---- the regulariser ------------------------------------------------------------------------------


def test_auxiliary_loss_is_kl_plus_mutual_information() -> None:
    weights = {"kl_weight": 0.3, "copula_weight": 2.0}
    model = _llama("copula", heads=4, prior_scale=0.2, **weights)
    _train_a_little(model)
    _output(model)
    expected = 0.0
    for kernel in _kernels(model):
        density = kernel.density
        assert isinstance(density, GeneratedFrequencies)
        mean, deviation = density.mean.detach(), (0.5 * density.log_variance.detach()).exp()
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 0.2)
        ).sum()
        lower = torch.eye(4)
        lower[torch.tril_indices(4, 4, -1).unbind()] = density.coupling.detach()
        covariance = lower @ lower.T
        scale = covariance.diagonal().rsqrt()
        correlation = covariance * scale[:, None] * scale
        information = -0.5 * torch.logdet(correlation) * 8
        expected += 0.3 * float(divergence) + 2.0 * float(information)
    assert expected > 0.0
    assert float(auxiliary_loss(model).detach()) == pytest.approx(expected, rel=1e-4)


def test_auxiliary_loss_without_noise_is_a_zero_with_a_gradient() -> None:
    for model in (torch.nn.Linear(2, 2), _llama("direct")):
        loss = auxiliary_loss(model)
        assert float(loss.detach()) == 0.0
        (loss + 0.0 * next(model.parameters()).sum()).backward()
        assert loss.requires_grad


def test_auxiliary_loss_before_the_first_forward_pass_is_refused() -> None:
    with pytest.raises(RuntimeError, match="call it after model"):
        auxiliary_loss(_bert("implicit"))


@pytest.mark.parametrize("build", [_llama, _bert])
def test_auxiliary_loss_accumulates_over_micro_batches(build: Any) -> None:
    model = build("copula", norm_dropout=0.0).train()
    _train_a_little(model)

    def gradients(rows: list[Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        for row in rows:
            # The noise of a row, on which the means of the second layer depend.
            torch.manual_seed(int(row[0, 0]))
            model(input_ids=row)
            auxiliary_loss(model).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    both = gradients([IDS[:1], IDS[1:]])
    first, second = gradients([IDS[:1]]), gradients([IDS[1:]])
    for name, gradient in both.items():
        assert torch.allclose(gradient, first[name] + second[name], atol=1e-6), name
    assert any("mechanism" in name and gradient.any() for name, gradient in both.items())


def test_auxiliary_loss_under_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        gradients = []
        for wrap in (False, True):
            model: Any = _llama("copula").train()
            run = torch.nn.parallel.DistributedDataParallel(model) if wrap else model
            torch.manual_seed(5)
            for ids in (IDS, IDS + 1):
                (run(input_ids=ids).logits.square().mean() + auxiliary_loss(run)).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_can_be_copied_after_a_forward_pass() -> None:
    model = _bert("copula").train()
    model(input_ids=IDS)
    assert auxiliary_loss(model).requires_grad
    twin = copy.deepcopy(model)
    assert torch.equal(_output(twin.eval()), _output(model.eval()))


# ---- PEFT -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_trains_saves_and_merges_the_kernel(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base: Any = _llama("copula", p="learned")
    names = modules_to_save(base)
    assert names == ["mechanism.kernel"]
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=names, r=2)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("mechanism.kernel" in name for name in trainable) == len(
        [n for n, _ in base.named_parameters() if "mechanism.kernel" in n]
    )
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=IDS).logits.square().mean() + auxiliary_loss(model)
        loss.backward()
        optimizer.step()
    expected = _output(model.eval())
    assert largest_error(expected, _output(base)) > 1e-3

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(_output(loaded), expected)
    merged = loaded.merge_and_unload()
    assert largest_error(_output(merged), expected) < LOGITS
    assert isinstance(_mechanisms(merged)[0].kernel, SpectralKernel)
    trained = {n.replace("base_model.model.", ""): v for n, v in model.state_dict().items()}
    for name, value in _own(merged).items():
        key = name.replace("mechanism.kernel", "mechanism.kernel.modules_to_save.default")
        assert torch.equal(value, trained[key]), name


def test_modules_to_save_names_what_peft_cannot_save() -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES),
        attn_implementation="expressive",
        hf_expressive=ExpressiveConfig(scale="learned"),
    )
    assert modules_to_save(model) == ["mechanism.gain"]
    assert modules_to_save(_llama("rbf")) == []
    bare = _llama("direct")
    _mechanisms(bare)[0].register_parameter("bare", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"mechanism\.bare"):
        modules_to_save(bare)


# ---- options --------------------------------------------------------------------------------------


def _differs(kernel: str, build: Any = _bert, **option: Any) -> bool:
    """Whether an option changes an output in evaluation, in training, or the regulariser."""
    base, changed = build(kernel), build(kernel, **option)
    results = []
    for model in (base, changed):
        evaluated = _output(model)
        model.train()
        torch.manual_seed(1)
        trained = _output(model)
        with torch.no_grad():
            results.append((evaluated, trained, auxiliary_loss(model)))
    return any(not torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("kernel", "option"),
    [
        *[(kernel, {"p": 3.0}) for kernel in KERNELS],
        *[(kernel, {"norm_dropout": 0.5}) for kernel in KERNELS],
        *[(kernel, {"authors_code": True}) for kernel in KERNELS],
        *[(kernel, {"softmax_heads": 1}) for kernel in KERNELS],
        *[(kernel, {"softmax_layers": (1,)}) for kernel in KERNELS],
        *[(kernel, {"num_features": 32}) for kernel in KERNELS[1:]],
        *[(kernel, {"epsilon": 0.5}) for kernel in KERNELS[1:]],
        *[(kernel, {"init": "gaussian"}) for kernel in ("stationary", "direct")],
        *[(kernel, {"init": "orthogonal"}) for kernel in ("stationary", "direct")],
        *[(kernel, {"condition": "constant"}) for kernel in NOISY],
        *[(kernel, {"prior_scale": 0.5}) for kernel in NOISY],
        *[(kernel, {"kl_weight": 0.7}) for kernel in NOISY],
        *[(kernel, {"seed": 1}) for kernel in NOISY],
        ("copula", {"copula_weight": 0.0}),
    ],
)
def test_each_option_changes_something(kernel: str, option: dict[str, Any]) -> None:
    assert _differs(kernel, **option)


@pytest.mark.parametrize(("one", "other"), list(itertools.pairwise(KERNELS)))
def test_each_kernel_is_another_model(one: str, other: str) -> None:
    assert largest_error(_output(_bert(one)), _output(_bert(other))) > 1e-4


def test_a_learned_exponent_starts_at_2_and_moves_the_output() -> None:
    for kernel in KERNELS:
        fixed, learned = _llama(kernel), _llama(kernel, p="learned")
        learned.load_state_dict(fixed.state_dict(), strict=False)
        assert largest_error(_output(learned), _output(fixed)) < LOGITS
        with torch.no_grad():
            for module in _kernels(learned):
                module.log_exponent.fill_(1.0)
        assert largest_error(_output(learned), _output(fixed)) > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "laplace"}, "kernel must be one of"),
        ({"num_features": 0}, "num_features"),
        ({"num_features": 8.0}, "num_features"),
        ({"kernel": "implicit", "num_features": 7}, "even"),
        ({"p": 0.9}, "p must be"),
        ({"p": "free"}, "p must be"),
        ({"p": True}, "p must be"),
        ({"norm_dropout": 1.0}, "norm_dropout"),
        ({"epsilon": -1e-9}, "epsilon"),
        ({"init": "zeros"}, "init must be one of"),
        ({"kernel": "implicit", "condition": "max"}, "condition must be one of"),
        ({"kernel": "implicit", "prior_scale": 0.0}, "prior_scale"),
        ({"kernel": "implicit", "kl_weight": -1.0}, "kl_weight"),
        ({"kernel": "copula", "copula_weight": float("nan")}, "copula_weight"),
        ({"kernel": "implicit", "seed": -1}, "seed"),
        ({"authors_code": 1}, "authors_code"),
        ({"cache_features": None}, "cache_features"),
        ({"softmax_heads": -1}, "softmax_heads"),
        *[
            ({"kernel": "rbf", name: value}, f"{name}=.* has no meaning for kernel='rbf'")
            for name, value in {
                "num_features": 32,
                "epsilon": 0.1,
                "init": "gaussian",
                "condition": "mean",
                "prior_scale": 1.0,
                "kl_weight": 1.0,
                "copula_weight": 2.0,
                "seed": 1,
                "cache_features": False,
            }.items()
        ],
        ({"kernel": "direct", "condition": "mean"}, "has no meaning"),
        ({"kernel": "implicit", "init": "gaussian"}, "has no meaning"),
        ({"kernel": "implicit", "copula_weight": 0.0}, "has no meaning"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImplicitKernelConfig(**options)


def test_options_survive_their_form_in_config_json() -> None:
    options = ImplicitKernelConfig(kernel="copula", p=3, num_features=8, softmax_layers=(1,))
    assert read_section(json.loads(json.dumps(options.to_dict()))) == options


def test_a_copula_of_one_head_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel='implicit'"):
        _llama("copula", heads=1)


def test_heads_that_stay_softmax_have_no_parameters() -> None:
    whole, half = _llama("direct"), _llama("direct", softmax_heads=2)
    assert _kernel(whole).density.weight.shape[0] == 2  # type: ignore[union-attr]
    assert _kernel(half).density.weight.shape[0] == 1  # type: ignore[union-attr]
    layers = _llama("direct", softmax_layers=(0,))
    assert [m.kernel is None for m in _mechanisms(layers)] == [True, False]


def test_a_call_with_other_heads_than_the_parameters_is_refused() -> None:
    model = _llama("direct")
    call = _calls(model)[0]
    narrow = dataclasses.replace(call, query=call.query[..., :4], key=call.key[..., :4])
    with pytest.raises(ValueError, match="2 key/value heads of size 8"):
        _mechanisms(model)[0](narrow)


def test_sizes_that_an_architecture_does_not_tell_are_asked_for() -> None:
    sizes: dict[str, Any] = {"layer": 0, "heads": None, "kv_heads": None, "head_dim": None}
    with pytest.raises(ValueError, match="use kernel='rbf'"):
        ImplicitKernelAttention(ImplicitKernelConfig(), **sizes)
    assert not ImplicitKernelAttention(ImplicitKernelConfig(kernel="rbf"), **sizes).has_parameters


def test_attach_and_detach_leave_the_softmax_model_as_it_was() -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    before, keys = _output(model), set(model.state_dict())
    hf_expressive.attach(model, ImplicitKernelConfig(kernel="copula"))
    assert largest_error(_output(model), before) > 1e-4
    hf_expressive.detach(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(_output(model), before)
