"""Launches from memory: a compiled kernel is used again only where Triton would choose the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import DEVICE, needs_gpu
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_expressive.ops import expressive_attention
from hf_expressive.ops.triton import host

MEMORY = torch.zeros(4096, dtype=torch.uint8)


def specialization(argument: Any) -> Any:
    """What Triton itself compiles an argument for."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    return native_specialize_impl(
        CUDABackend(GPUTarget("cuda", 90, 32)), argument, False, True, True
    )


def tensor_at(offset: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose address is `offset` elements beyond a multiple of 16."""
    start = -MEMORY.data_ptr() % 16
    return MEMORY[start : start + 2048].view(dtype)[offset:]


scalars = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1]),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.builds(
        tensor_at,
        st.integers(0, 16),
        st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int32]),
    ),
)
arguments = st.one_of(scalars, st.lists(scalars, min_size=1, max_size=3).map(tuple))


@settings(max_examples=500, deadline=None)
@given(arguments, arguments)
def test_arguments_that_count_as_alike_are_alike_to_triton(one: Any, other: Any) -> None:
    if host._property(one) == host._property(other):
        assert specialization(one) == specialization(other)


def test_every_kind_of_argument_counts() -> None:
    """The test above would pass if nothing ever counted as alike, or if all pairs it draws differed."""
    kinds = [2, 16, 1, 2**40, 2**40 + 1, 0.5, True, None, tensor_at(0, torch.float32)]
    kinds += [tensor_at(1, torch.float32), tensor_at(0, torch.bfloat16), (2, None), (16, None)]
    found = [host._property(kind) for kind in kinds]
    assert len(set(found)) == len(kinds)
    assert len({specialization(kind) for kind in kinds}) == len(kinds)
    assert host._property(3) == host._property(12345)
    assert host._property(0.5) == host._property(-7.0)
    assert host._property(tensor_at(0, torch.uint8)) == host._property(tensor_at(16, torch.uint8))


@pytest.mark.parametrize("transposed", [False, True])
def test_descriptions_are_those_that_triton_makes(transposed: bool) -> None:
    shape, block = (2, 3, 40, 16), (1, 1, 32, 16)
    for _ in range(2):
        tensor = torch.randn(2, 40, 3, 16).transpose(1, 2) if transposed else torch.randn(shape)
        made = TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
        found = vars(host.describe(TensorDescriptor, tensor, block))
        assert found.pop("property") == (TensorDescriptor, torch.float32, block, None)
        assert found.pop("base") is tensor
        assert found == {name: value for name, value in vars(made).items() if name != "base"}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2 * 3 * 40 * 16 + 1)[1:].view(2, 3, 40, 16),
        torch.randn(2, 3, 40, 17)[..., 1:],
        torch.randn(2, 3, 16, 40).mT,
        torch.randn(2, 1, 40, 16).expand(-1, 3, -1, -1),
        torch.randn(2, 3, 40, 6),
    ],
    ids=["address", "rows of 68 bytes", "last stride", "expanded", "rows of 24 bytes"],
)
def test_what_a_description_cannot_express_is_copied(tensor: Tensor) -> None:
    found = host.describe(TensorDescriptor, tensor, (1, 1, 32, 16))
    assert found.base.data_ptr() != tensor.data_ptr()
    assert torch.equal(found.base, tensor)
    assert found.base.data_ptr() % 16 == 0
    assert found.strides[-1] == 1
    assert all(stride * 4 % 16 == 0 for stride in found.strides[:-1])


@needs_gpu
def test_launches_from_memory_compute_what_the_first_one_did() -> None:
    """Other sizes, addresses and options after one another, each against the reference."""
    for length in (64, 65, 80, 64, 65):
        for offset in (0, 1, 0):
            query, key, value = torch.randn(3, 1, 2, length, 33, device=DEVICE)[..., offset:][
                ..., :32
            ].unbind()
            for power in (1.0, 2.0, 1.0):
                options = {"is_causal": True, "power": power}
                found = expressive_attention(query, key, value, impl="triton", **options)  # type: ignore[arg-type]
                exact = (x.double() for x in (query, key, value))
                wanted = expressive_attention(*exact, impl="reference", **options)  # type: ignore[arg-type]
                assert float((found - wanted).abs().max()) < 1e-5
