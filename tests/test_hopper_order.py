"""The forward kernel for Hopper GPUs, run on the CPU by `gluon_machine` in random orders of events."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from gluon_machine import Deadlock, launcher
from kernel_device import needs_interpreter
from test_hopper import CASES, TRANSPOSED, as_in_models, check, problem_of

from hf_expressive.ops import hopper
from hf_expressive.ops.hopper import launch

pytestmark = [
    needs_interpreter,
    pytest.mark.usefixtures("poisoned"),
]


def off_gpu(
    name: str,
    size: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    value_size: int | None = None,
    transposed: bool = False,
    **machine: Any,
) -> None:
    """`check` with the kernel run by `gluon_machine`."""
    monkeypatch.setattr(launch, "forward_kernel", launcher("forward_kernel", seed, **machine))
    monkeypatch.setattr(hopper, "unsupported", lambda problem: None)
    problem = problem_of(name, size, value_size=value_size)
    check(as_in_models(problem) if transposed else problem)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_operands_may_be_transposed_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    off_gpu(name, 64, 2, monkeypatch, transposed=True)


def test_a_row_to_which_a_mask_leaves_one_key_gets_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, as where bounds leave one; the keys beyond are many, but not for these rows."""
    monkeypatch.setattr(launch, "forward_kernel", launcher("forward_kernel", 4))
    problem = problem_of("hidden keys", 64)
    shown = (torch.arange(300) == 3) | (torch.arange(300) >= 200)
    ranges = dataclasses.replace(problem.ranges, keys=shown[None])
    out, _ = launch.forward(dataclasses.replace(problem, ranges=ranges))
    values = problem.value[:, :, 3:4].repeat_interleave(problem.group, dim=1)
    assert torch.equal(out[:, :, 3:200], values.expand(-1, -1, 197, -1))


LONG = ("one head, many tiles", "more heads than programs")


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", [name for name in CASES if name not in LONG])
def test_matches_the_reference_in_any_order_of_events(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    off_gpu(name, size, size + len(name), monkeypatch)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    "name",
    [
        "square, key bias, causal",
        "square, key bias, gain and sinks",
        "square, left padding",
        "square, one head spreads widely",
    ],
)
def test_values_may_have_another_size(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    off_gpu(name, size, size + len(name), monkeypatch, value_size=192 - size)


@pytest.mark.parametrize("name", LONG)
def test_programs_share_the_tiles_in_any_order_of_events(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    off_gpu(name, 64, 1, monkeypatch)


def test_what_is_not_a_number_stays_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes tile after tile; nothing of one may reach the next."""
    monkeypatch.setattr(launch, "forward_kernel", launcher("forward_kernel", 3))
    problem = problem_of("more heads than programs", 64)
    expected = launch.forward(problem)
    query = problem.query.clone()
    query[:, ::3, 5] = torch.nan
    found = launch.forward(dataclasses.replace(problem, query=query))
    spoilt = torch.zeros_like(expected[1], dtype=torch.bool)
    spoilt[:, ::3, 5] = True
    assert found[0][spoilt].isnan().all()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[~spoilt], other[~spoilt])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # values used before they have come
        (
            "mbarrier.wait(step_in.index(step % STAGES), (step // STAGES) & 1, pred=tile >= 0)",
            "pass",
        ),
        # keys and values released while they are multiplied
        (
            "            out = warpgroup_mma_wait(0, deps=[out])\n"
            "            mbarrier.arrive(step_out.index(stage), count=1)\n",
            "            mbarrier.arrive(step_out.index(stage), count=1)\n"
            "            out = warpgroup_mma_wait(0, deps=[out])\n",
        ),
        # queries overwritten while they are multiplied
        ("mbarrier.wait(queries_out.index(2 * slot + half), ((turn >> 1) & 1) ^ 1)", "pass"),
        # an output overwritten on its way to memory
        ("    tma.store_wait(0)\n    staging", "    staging"),
        # the next tile's queries in the place of this one's
        ("index_in.index(slot), (turn >> 1) & 1)", "index_in.index(slot), (turn >> 1) & 1 ^ 1)"),
    ],
)
def test_the_machine_notices_a_broken_kernel(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: str) -> str:
        assert source.count(old) == 1
        return source.replace(old, new)

    launcher("forward_kernel", 0, broken)  # outside of what counts as noticed

    def fails(seed: int) -> bool:
        try:
            off_gpu("one head, many tiles", 64, seed, monkeypatch, change=broken)
        except (AssertionError, AttributeError, TypeError, Deadlock):
            return True
        return False

    assert any(map(fails, range(6)))
