"""Spectral features, magnitudes and the tensor function, against definitions written out in loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tolerances import SAME_IN_FLOAT64, assert_within_budget, largest_error
from torch import Tensor

from hf_expressive.ops import KeyRanges, implicit_kernel_attention
from hf_expressive.ops.implicit_kernel import kernel_features
from hf_expressive.ops.spectral import (
    reference,
    spectral_features,
    spectral_kernel,
    squared_norm,
)

SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 7))
DENSITIES = st.sampled_from([1, 2])


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def _points(shape: tuple[int, int, int, int], densities: int, seed: int) -> tuple[Tensor, ...]:
    """x, y (batch, heads, positions, dim) and frequencies (heads, densities, dim, 6)."""
    batch, heads, length, dim = shape
    x = _normal(batch, heads, length, dim, seed=seed)
    y = _normal(batch, heads, length + 1, dim, seed=seed + 1)
    return x, y, 0.3 * _normal(heads, densities, dim, 6, seed=seed + 2)


def _kernel(x: Tensor, y: Tensor, frequencies: Tensor) -> Tensor:
    features = spectral_features(x, frequencies), spectral_features(y, frequencies)
    return features[0] @ features[1].transpose(-1, -2)


# ---- the kernel -----------------------------------------------------------------------------------


def test_kernel_is_the_mean_of_cosines() -> None:
    x, y, frequencies = _points((1, 2, 3, 4), 2, seed=0)
    kernel = spectral_kernel(x, y, frequencies)
    for head in range(2):
        for i in range(3):
            for j in range(4):
                total = 0.0
                for m in range(6):
                    for s in range(2):
                        for t in range(2):
                            w, v = frequencies[head, s, :, m], frequencies[head, t, :, m]
                            phase = float(w @ x[0, head, i]) - float(v @ y[0, head, j])
                            total += math.cos(2 * math.pi * phase)
                assert float(kernel[0, head, i, j]) == pytest.approx(total / 24, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(SHAPES, DENSITIES, st.integers(0, 999))
def test_features_give_the_kernel(
    shape: tuple[int, int, int, int], densities: int, seed: int
) -> None:
    x, y, frequencies = _points(shape, densities, seed)
    kernel = spectral_kernel(x, y, frequencies)
    assert largest_error(_kernel(x, y, frequencies), kernel) < SAME_IN_FLOAT64
    each = torch.stack([frequencies, 2.0 * frequencies])[: shape[0]]
    batched = torch.cat([_kernel(x[b : b + 1], y[b : b + 1], each[b]) for b in range(shape[0])])
    assert largest_error(_kernel(x, y, each), batched) < SAME_IN_FLOAT64
    assert largest_error(spectral_kernel(x, y, each), batched) < SAME_IN_FLOAT64


@settings(max_examples=40, deadline=None)
@given(SHAPES, DENSITIES, st.integers(0, 999))
def test_kernel_is_symmetric_bounded_and_its_square_is_positive(
    shape: tuple[int, int, int, int], densities: int, seed: int
) -> None:
    x, y, frequencies = _points(shape, densities, seed)
    kernel = _kernel(x, y, frequencies)
    assert largest_error(kernel, _kernel(y, x, frequencies).transpose(-1, -2)) < SAME_IN_FLOAT64
    assert float(kernel.abs().max()) <= 1.0 + 1e-12
    diagonal = [_kernel(z, z, frequencies).diagonal(dim1=-2, dim2=-1) for z in (x, y)]
    if densities == 1:
        # A stationary kernel is largest where its arguments agree: there it is 1.
        assert largest_error(diagonal[0], torch.ones_like(diagonal[0])) < 1e-12
    bound = diagonal[0].unsqueeze(-1) * diagonal[1].unsqueeze(-2)
    assert bool((kernel.square() <= bound + 1e-12).all())
    gram = _kernel(y, y, frequencies).square()
    assert float(torch.linalg.eigvalsh(gram).min()) > -1e-10


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 999), st.floats(-20, 20))
def test_stationary_kernel_depends_on_the_difference_only(
    shape: tuple[int, int, int, int], seed: int, shift: float
) -> None:
    x, y, frequencies = _points(shape, 1, seed)
    moved = _kernel(x + shift, y + shift, frequencies)
    assert largest_error(moved, _kernel(x, y, frequencies)) < 1e-10


def test_direct_kernel_depends_on_the_position_too() -> None:
    x, y, frequencies = _points((1, 2, 5, 4), 2, seed=0)
    moved = _kernel(x + 1.0, y + 1.0, frequencies)
    assert largest_error(moved, _kernel(x, y, frequencies)) > 0.1


def test_direct_kernel_of_equal_densities_is_stationary() -> None:
    x, y, frequencies = _points((1, 2, 5, 4), 1, seed=0)
    twice = frequencies.expand(-1, 2, -1, -1)
    assert largest_error(_kernel(x, y, twice), _kernel(x, y, frequencies)) < SAME_IN_FLOAT64


def test_gaussian_frequencies_converge_to_the_rbf_kernel_with_the_root_of_their_number() -> None:
    dim, heads = 8, 200
    x, y = _normal(1, 1, 6, dim, seed=1), _normal(1, 1, 6, dim, seed=2)
    distance = (x[:, :, :, None] - y[:, :, None]).square().sum(-1)
    root_of_rbf = torch.exp(-distance / (4 * math.sqrt(dim)))
    sizes = [16, 64, 256, 1024]
    errors = []
    for size in sizes:
        deviation = (2 * math.sqrt(dim)) ** -0.5 / (2 * math.pi)
        frequencies = deviation * _normal(heads, 1, dim, size, seed=size)
        kernel = _kernel(x.expand(-1, heads, -1, -1), y.expand(-1, heads, -1, -1), frequencies)
        errors.append(float((kernel - root_of_rbf).square().mean().sqrt()))
    steps = [math.log(a / b) / math.log(4) for a, b in itertools.pairwise(errors)]
    assert all(0.45 < step < 0.55 for step in steps), f"error · M^½ is not constant: {errors}"
    assert errors[-1] < 0.03


# ---- magnitudes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 1.5, 1.8, 2.0, 3.0, 8.0])
def test_squared_norm_is_the_square_of_the_norm(p: float) -> None:
    x = _normal(2, 3, 4, 5)
    expected = torch.linalg.vector_norm(x, ord=p, dim=-1).square()
    assert largest_error(squared_norm(x, p), expected) < 1e-12 * float(expected.max())
    per_head = torch.full((3,), p, dtype=torch.float64)
    assert largest_error(squared_norm(x, per_head), expected) < 1e-12 * float(expected.max())


def test_each_head_has_its_own_exponent() -> None:
    x = _normal(2, 3, 4, 5)
    exponents = torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64)
    norm = squared_norm(x, exponents)
    for head, p in enumerate(exponents.tolist()):
        assert largest_error(norm[:, head], squared_norm(x, p)[:, head]) < SAME_IN_FLOAT64


@pytest.mark.parametrize("p", [1.3, 3.0, 8.0])
@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_squared_norm_neither_overflows_nor_underflows(p: float, factor: float) -> None:
    x = _normal(1, 1, 4, 5)
    result = squared_norm((x * factor).float(), p).double() / factor**2
    assert largest_error(result, squared_norm(x, p)) < 1e-5 * float(squared_norm(x, p).max())


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_gradient_of_the_squared_norm(p: float) -> None:
    x = _normal(1, 2, 3, 4).requires_grad_()
    exponent = torch.full((2,), p, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: squared_norm(x, p), (x,))
    assert torch.autograd.gradcheck(squared_norm, (x, exponent))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_zero_vector_has_norm_and_gradient_zero(p: float, learned: bool) -> None:
    x = torch.zeros(1, 1, 2, 3, requires_grad=True)
    exponent = torch.full((1,), p, requires_grad=True)
    norm = squared_norm(x, exponent if learned else p)
    norm.sum().backward()
    assert x.grad is not None
    assert not norm.any()
    assert not x.grad.any()
    assert not learned or (exponent.grad is not None and bool(exponent.grad.isfinite().all()))


# ---- the tensor function --------------------------------------------------------------------------


def _operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Two batch items, four heads over two key/value heads, five queries, seven keys."""
    query, key = _normal(2, 4, 5, 6, seed=1), _normal(2, 2, 7, 6, seed=2)
    return query.to(dtype), key.to(dtype), _normal(2, 2, 7, 3, seed=3).to(dtype)


def _frequencies(densities: int, *batch: int) -> Tensor:
    return 0.2 * _normal(*batch, 2, densities, 6, 9, seed=4)


def test_reference_is_the_formula_in_loops() -> None:
    query, key, value = _operands()
    frequencies, p, epsilon, scale = _frequencies(2), 3.0, 0.01, 0.7
    out, weights = reference(
        query, key, value, frequencies=frequencies, p=p, epsilon=epsilon, scale=scale
    )
    length = math.sqrt(scale * math.sqrt(6))
    b, h, i = 1, 3, 4
    row = []
    for j in range(7):
        q, k = query[b, h, i] * length, key[b, h // 2, j] * length
        phases_q = 2 * math.pi * (q @ frequencies[h // 2])
        phases_k = 2 * math.pi * (k @ frequencies[h // 2])
        similarity = float(
            (phases_q.cos().sum(0) * phases_k.cos().sum(0)).sum()
            + (phases_q.sin().sum(0) * phases_k.sin().sum(0)).sum()
        ) / (4 * 9)
        norm = sum(abs(float(entry)) ** p for entry in k) ** (2 / p)
        row.append((similarity**2 + epsilon) * math.exp(norm / (2 * math.sqrt(6))))
    expected = torch.tensor(row, dtype=torch.float64) / sum(row)
    assert largest_error(weights[b, h, i], expected) < 1e-12
    assert largest_error(out[b, h, i], expected @ value[b, h // 2]) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("p", [2.0, 1.8, "tensor"])
@pytest.mark.parametrize("densities", [0, 1, 2])
def test_attention_is_the_reference(densities: int, p: Any, scale: float | None, impl: Any) -> None:
    query, key, value = _operands()
    frequencies = _frequencies(densities) if densities else None
    p = torch.tensor([1.5, 3.0]) if p == "tensor" else p
    options = {"frequencies": frequencies, "p": p, "epsilon": 1e-3, "scale": scale}
    visible = torch.ones(5, 7, dtype=torch.bool).tril(2)
    for is_causal in (False, True):
        out = implicit_kernel_attention(
            query, key, value, is_causal=is_causal, impl=impl, **options
        )
        expected, _ = reference(
            query, key, value, visible=visible if is_causal else None, **options
        )
        assert largest_error(out, expected) < SAME_IN_FLOAT64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_in_lower_precision(dtype: torch.dtype) -> None:
    """Against the same features rounded to the dtype and multiplied out densely."""
    query, key, value = _operands(dtype)
    frequencies = _frequencies(2)
    out = implicit_kernel_attention(query, key, value, frequencies=frequencies)
    expected, _ = reference(query, key, value, frequencies=frequencies)
    # Heads 0 and 1 share the first key/value head, 2 and 3 the second.
    query, key, value = (
        query.float(),
        *(x.float().repeat_interleave(2, dim=1) for x in (key, value)),
    )
    doubled = frequencies.float().repeat_interleave(2, dim=0)
    features = [spectral_features(x, doubled).to(dtype).float() for x in (query, key)]
    score = features[0] @ features[1].transpose(-1, -2)
    magnitude = key.square().sum(-1) / (2 * math.sqrt(6))
    weight = (score.square() + 1e-5) * magnitude.exp()[:, :, None]
    plain = ((weight / weight.sum(-1, keepdim=True)) @ value).to(dtype)
    assert_within_budget(out, expected, plain, str(dtype))


def test_rbf_kernel_with_p_2_is_softmax_attention() -> None:
    query, key, value = _operands()
    softmax = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    )
    assert largest_error(implicit_kernel_attention(query, key, value), softmax) < SAME_IN_FLOAT64


def test_rbf_kernel_with_another_p_is_softmax_attention_with_a_bias_a_key() -> None:
    query, key, value = _operands()
    norms = [torch.linalg.vector_norm(key, ord=p, dim=-1).square() for p in (3, 2)]
    bias = ((norms[0] - norms[1]) / (2 * math.sqrt(6))).repeat_interleave(2, dim=1)[:, :, None]
    softmax = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, dim=1),
        value.repeat_interleave(2, dim=1),
        attn_mask=bias.expand(-1, -1, 5, -1),
    )
    out = implicit_kernel_attention(query, key, value, p=3.0)
    assert largest_error(out, softmax) < SAME_IN_FLOAT64


@pytest.mark.parametrize("densities", [0, 1, 2])
def test_gradients_of_queries_keys_values_frequencies_and_exponents(densities: int) -> None:
    # Two heads over one key/value head, two queries, three keys, size 2: gradcheck is slow.
    query, key, value = _normal(2, 2, 2, 2, seed=1), _normal(2, 1, 3, 2), _normal(2, 1, 3, 1)
    inputs = [query, key, value, torch.tensor([1.5], dtype=torch.float64)]
    if densities:
        inputs.append(0.2 * _normal(2, 1, densities, 2, 3, seed=4))
    for tensor in inputs:
        tensor.requires_grad_()

    def attention(query: Tensor, key: Tensor, value: Tensor, p: Tensor, *rest: Tensor) -> Tensor:
        frequencies = rest[0] if rest else None
        return implicit_kernel_attention(
            query, key, value, frequencies=frequencies, p=p, epsilon=1e-2, is_causal=True
        )

    assert torch.autograd.gradcheck(attention, inputs)


def test_masks_bias_sinks_and_windows_reach_the_weights() -> None:
    query, key, value = _operands()
    options = {"frequencies": _frequencies(1), "impl": "blockwise"}
    plain = implicit_kernel_attention(query, key, value, **options)
    start, end = torch.zeros(1, 5, dtype=torch.int32), torch.full((1, 5), 4, dtype=torch.int32)
    short = implicit_kernel_attention(query, key[:, :, :4], value[:, :, :4], **options)
    ranges = KeyRanges(start, end)
    masked = implicit_kernel_attention(query, key, value, attention_mask=ranges, **options)
    assert largest_error(masked, short) < SAME_IN_FLOAT64
    for option in (
        {"bias": _normal(1, 4, 5, 7)},
        {"sinks": _normal(4)},
        {"sliding_window": 2},
        {"is_causal": True},
    ):
        out = implicit_kernel_attention(query, key, value, **options, **option)
        assert largest_error(out, plain) > 1e-3, option


def test_softcap_acts_on_the_logit_of_the_rbf_kernel() -> None:
    query, key, value = _operands()
    capped = implicit_kernel_attention(query, key, value, softcap=0.5)
    assert largest_error(capped, implicit_kernel_attention(query, key, value)) > 1e-3


def test_features_keep_their_precision_under_autocast() -> None:
    frequencies = _frequencies(2).float()
    for x in _operands(torch.float32)[:2]:
        plain = kernel_features(x, frequencies, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kernel_features(x, frequencies, 1.0), plain)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"p": 0.5}, "p must"),
        ({"p": math.nan}, "p must"),
        ({"p": torch.ones(4)}, "p must"),
        ({"epsilon": -1.0, "frequencies": _frequencies(1)}, "epsilon"),
        ({"frequencies": _frequencies(1)[:1]}, "frequencies"),
        ({"frequencies": _frequencies(1)[..., :3, :]}, "frequencies"),
        ({"frequencies": torch.zeros(2, 3, 6, 9)}, "frequencies"),
        ({"frequencies": _frequencies(1, 3)}, "frequencies"),
        ({"frequencies": _frequencies(1), "softcap": 30.0}, "softcap"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        implicit_kernel_attention(*_operands(), **options)


def test_a_query_without_heads_is_refused() -> None:
    query, key, value = _operands()
    with pytest.raises(ValueError, match="four dimensions"):
        implicit_kernel_attention(query[0], key, value)
