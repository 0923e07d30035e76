"""The backward kernel for Hopper GPUs: on such a GPU; run by `gluon_machine` and compiled everywhere."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from gluon_machine import Deadlock, launcher
from kernel_device import DEVICE, GPU, needs_interpreter
from test_hopper import (
    CASES,
    HOPPER,
    SQUARES,
    TRANSPOSED,
    as_in_models,
    needs_hopper,
    problem_of,
)
from test_triton import Case, differentiable, plain
from tolerances import FACTOR, FLOOR, assert_within_budget, largest_error
from torch import Tensor

from hf_expressive.ops import hopper, reference, triton
from hf_expressive.ops.hopper import gradient
from hf_expressive.ops.layout import in_order_of
from hf_expressive.ops.problem import AttentionProblem
from hf_expressive.ops.response import Response

BFLOAT16 = torch.bfloat16


def gradients_of(problem: AttentionProblem) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of query, key, value and key bias: found, in float64, of the plain implementation."""
    exact, rough = (differentiable(problem, d) for d in (torch.float64, problem.query.dtype))
    out, log_normalizer, _ = reference.attention(exact)
    grad_out = torch.randn_like(out, dtype=problem.query.dtype)
    out.backward(grad_out.double())
    plain(rough).backward(grad_out)
    if HOPPER:
        seen = hopper.forward(problem)
    else:
        seen = out.detach().to(grad_out.dtype), log_normalizer.detach().float()
    is_biased = problem.key_bias is not None
    *found, bias = gradient.gradients(problem, *seen, grad_out, need_key_bias=is_biased)
    for rows, like in zip(found, (problem.query, problem.key, problem.value), strict=True):
        assert in_order_of(like, rows) is rows
    names = ["query", "key", "value"]
    if is_biased:
        assert bias is not None
        found.append(bias)
        names.append("key_bias")
    wanted = [getattr(exact, name).grad for name in names]
    return found, wanted, [getattr(rough, name).grad for name in names]


def check(problem: AttentionProblem) -> None:
    results = gradients_of(problem)
    for name, *gradients in zip(("query", "key", "value"), *results, strict=False):
        assert_within_budget(*gradients, name=f"gradient of {name}")
    for found, wanted, rough in zip(*(result[3:] for result in results), strict=True):
        # Few keys carry most of a key bias's gradient, and with it the rounding of out that is in δ: the
        # largest error of a single draw says little, so all keys are compared together.
        budget = FACTOR * (rough - wanted).norm() + FLOOR[BFLOAT16] * wanted.numel() ** 0.5
        assert (found - wanted).norm() <= budget, "gradient of the key bias"


def in_bands(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Bands of so many bytes; query heads share sums where a key/value head's have more."""
    for name in ("_BAND_BYTES", "_SHARED_BAND_BYTES"):
        monkeypatch.setattr(gradient, name, size)
    monkeypatch.setattr(gradient, "_PROGRAMS_A_HEAD", 2**30)


@needs_interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "size", "seed"),
    [
        ("causal", 128, 1),
        ("causal", 64, 2),
        ("fewer queries than keys", 128, 3),
        ("more queries than keys: empty rows", 64, 4),
        ("window", 64, 5),
        ("power 2, gain", 128, 6),
        ("gain", 64, 7),
        ("sinks", 64, 8),
        ("packed, bidirectional, one pattern for both", 64, 9),
        ("rows that see nothing", 128, 10),
        ("half of the tiles see nothing", 64, 11),
        ("square, key bias, causal", 64, 12),
        ("square, key bias, gain and sinks", 64, 13),
        ("square, key bias, small scale, sinks", 128, 14),
        ("square, left padding", 64, 15),
        ("square, one head spreads widely", 64, 16),
        ("square, constant weights", 64, 17),
        ("hidden keys", 64, 20),
        ("hidden keys", 128, 21),
        ("keys padded on both sides", 64, 22),
        ("one pattern, keys of each sequence", 64, 23),
        ("square, hidden keys", 64, 24),
    ],
)
@pytest.mark.parametrize("band", [1, 2**30], ids=["bands", "one band"])
def test_matches_the_reference_in_any_order_of_events(
    name: str,
    size: int,
    seed: int,
    band: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradient, "backward_kernel", launcher("backward_kernel", seed))
    # With bands of one head also sums of dk and dv that query heads share.
    in_bands(monkeypatch, band)
    check(problem_of(name, size))


@pytest.mark.skipif(GPU and not HOPPER, reason="the kernel runs on a Hopper GPU or a CPU")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("is_shared", [False, True], ids=["own sums", "shared sums"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_operands_may_be_transposed_views(
    name: str, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not HOPPER:
        monkeypatch.setattr(gradient, "backward_kernel", launcher("backward_kernel", 25))
    if is_shared:
        in_bands(monkeypatch, 1)
    check(as_in_models(problem_of(name, 64)))


def in_sweeps(size: int, monkeypatch: pytest.MonkeyPatch) -> AttentionProblem:
    """A problem whose first row takes two programs five sweeps, of which the third is turned round."""
    in_bands(monkeypatch, 1)
    monkeypatch.setattr(gradient, "num_processors", lambda _: 2)
    sizes = (2, 2, 1, 1100, 1120, size, size)
    return Case("in sweeps", sizes, BFLOAT16, 1.0, {"is_causal": True}).problem()


@needs_interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared sums", "own sums"])
@pytest.mark.parametrize(("size", "seed"), [(64, 20), (128, 21)])
def test_every_second_sweep_over_a_long_row_is_turned_round(
    size: int, seed: int, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "backward_kernel", launcher("backward_kernel", seed))
    monkeypatch.setattr(gradient, "is_shared", lambda *_: is_shared)
    check(in_sweeps(size, monkeypatch))


@needs_interpreter
@pytest.mark.parametrize(("size", "value_size"), [(128, 64), (64, 128)])
def test_values_of_another_size_than_keys(
    size: int, value_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "backward_kernel", launcher("backward_kernel", 18))
    check(problem_of("square, key bias", size, value_size=value_size))


@needs_interpreter
def test_the_gradient_of_a_key_bias_changes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "backward_kernel", launcher("backward_kernel", 19))
    problem = problem_of("square, left padding", 64)
    out, log_normalizer, _ = reference.attention(problem)
    seen = out, log_normalizer.float()
    grad_out = torch.randn_like(out)
    *alone, nothing = gradient.gradients(problem, *seen, grad_out)
    assert nothing is None
    *found, bias = gradient.gradients(problem, *seen, grad_out, need_key_bias=True)
    assert bias is not None
    assert all(map(torch.equal, alone, found))


@needs_interpreter
def test_results_do_not_depend_on_the_order_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of("causal", 64)
    in_bands(monkeypatch, 1)
    results = []
    for seed in range(4):
        monkeypatch.setattr(gradient, "backward_kernel", launcher("backward_kernel", seed))
        torch.manual_seed(0)
        results.append(gradients_of(problem)[0])
    assert all(all(map(torch.equal, result, results[0])) for result in results)


#: What breaks the kernel: (size, for which problem, what stands there, what instead).
FAULTS = [
    # a part of dq overwritten before it was read
    (64, "plain", "                    tma.store_wait(0)\n", ""),
    (128, "plain", "                    tma.store_wait(0)\n", ""),
    # queries released while they are multiplied for dk
    (
        64,
        "plain",
        "            score = warpgroup_mma_wait(2, deps=[score])\n",
        "            score = warpgroup_mma_wait(2, deps=[score])\n"
        "            mbarrier.arrive(rows_out.index(stage), count=1)\n",
    ),
    # scores of queries that have not come
    (
        64,
        "plain",
        "            mbarrier.wait(rows_in.index(following), ((step + 1) // STAGES) & 1)\n",
        "",
    ),
    # a part of dq stored before the writer has read what was there
    (
        64,
        "plain",
        "            mbarrier.wait(sum_out.index(step % PLACES), ((step // PLACES) & 1) ^ 1)\n",
        "",
    ),
    (
        128,
        "plain",
        "            mbarrier.wait(sum_out.index(step % PLACES), ((step // PLACES) & 1) ^ 1)\n",
        "",
    ),
    # a part of dq handed over that is not there yet
    (64, "plain", "sum_in.index((step - 1) & 1), count=1", "sum_in.index(step & 1), count=1"),
    # parts of dq added whenever they come, the first of which should overwrite
    (64, "plain", "while arrived < before", "while arrived < 0"),
    # the wrong phase
    (64, "plain", "mbarrier.wait(keys_in, turn & 1)", "mbarrier.wait(keys_in, turn + 1 & 1)"),
    # the counter raised before the last part has come
    (
        64,
        "plain",
        'publish(own_turns + sent, "0")\n        turn += 1',
        'publish(own_turns + sent, "1")\n        turn += 1',
    ),
    # values in their place before dk has left it
    (
        64,
        "plain",
        "        tma.store_wait(0)\n        mbarrier.arrive(values_out, count=1)\n",
        "        mbarrier.arrive(values_out, count=1)\n",
    ),
    # dk in the place of dv before that has left
    (64, "plain", "            tma.store_wait(0)\n            staging", "            staging"),
    # keys released while they are multiplied for dq
    (
        128,
        "plain",
        "        query_part, key_total = warpgroup_mma_wait(0, deps=[query_part, key_part])\n",
        "        mbarrier.arrive(keys_out, count=1)\n"
        "        query_part, key_total = warpgroup_mma_wait(0, deps=[query_part, key_part])\n",
    ),
    # query heads that add to dv before it is their turn
    (64, "shared", "while arrived < row // (rows // share)", "while arrived < 0"),
    # the turn handed on before all of dk has come
    (64, "shared", "    complete()\n", "    pass\n"),
    # halves of dk in the place of halves of dv before these have left
    (128, "shared", "            tma.store_wait(1)\n            staging", "            staging"),
    (64, "shared", "            tma.store_wait(1)\n            other", "            other"),
    # parts of dq in another order than that of the items
    (64, "in sweeps", "gl.maximum(last - highest, 0) + tile", "tile"),
    (64, "in sweeps", "gl.maximum(low // _KEYS, lowest)", "low // _KEYS"),
]


@needs_interpreter
@pytest.mark.parametrize(("size", "name", "old", "new"), FAULTS)
def test_the_machine_notices_a_broken_kernel(
    size: int, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: str) -> str:
        assert old in source
        return source.replace(old, new)

    # One head at a time, so that programs meet at its queries.
    in_bands(monkeypatch, 1)
    if name == "plain":
        monkeypatch.setattr(gradient, "is_shared", lambda *_: False)
    if name == "in sweeps":
        problem = in_sweeps(size, monkeypatch)
    else:
        problem = problem_of(
            "two heads that share a tile of keys" if name == "shared" else "plain", size
        )

    def fails(seed: int) -> bool:
        monkeypatch.setattr(gradient, "backward_kernel", launcher("backward_kernel", seed, broken))
        try:
            results = gradients_of(problem)
        except (AssertionError, AttributeError, TypeError, Deadlock):
            return True
        return any(
            largest_error(found, wanted) > FACTOR * largest_error(rough, wanted) + FLOOR[BFLOAT16]
            for found, wanted, rough in zip(*results, strict=True)
        )

    assert any(map(fails, range(48)))


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from hf_expressive.ops.hopper.tiled_backward import backward_kernel as kernel

def tiles(name, dtype, *block):
    swizzled = gl.NVMMASharedLayout.get_default_for(list(block), dtype)
    layout = swizzled if len(block) > 2 else gl.NVMMASharedLayout(0, 32, 2)
    return f"tensordesc<{{name}}{{list(block)}},{{layout!r}}>".replace(", ", ",", len(block) - 1)

constants = dict(STAGES=3, POWER={power}, FOLDED={folded}, SINGLE=True, ROOMY={size} == 64, {absent})
types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
types |= dict.fromkeys(["query_tiles", "grad_tiles"], tiles("bf16", gl.bfloat16, 1, 1, 64, {size}))
types |= dict.fromkeys(
    ["key_tiles", "value_tiles", "grad_key_tiles", "grad_value_tiles"],
    tiles("bf16", gl.bfloat16, 1, 1, 128, {size}),
)
if "key_turns" not in constants:
    halves = tiles("fp32", gl.float32, 1, 128, {size} // 2)
    types |= dict(grad_key_tiles=halves, grad_value_tiles=halves, key_turns="*i32")
types |= dict(sum_tiles=tiles("fp32", gl.float32, 1, {size}, 64))
types |= dict(delta_tiles=tiles("fp32", gl.float32, 1, 64))
types |= dict(counter="*i32", turns="*i32")
if "keys" not in constants:
    types |= dict(keys="*u8")
types |= dict(scale="fp32", inverse="fp32", final="fp32")
floats = dict.fromkeys(["gain", "key_factors", "grad_key_bias"], "*fp32")
tables = dict.fromkeys(["spans", "table", "starts", "ends"], "*i32")
types |= {{name: kind for name, kind in (tables | floats).items() if name not in constants}}
places = {{(kernel.arg_names.index(name),): value for name, value in constants.items()}}
compiled = compile(GluonASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32),
                   options=dict(num_warps=8))
assembly = compiled.asm["ptx"]
for instruction in ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk", "cp.reduce.async.bulk"):
    assert instruction in assembly, instruction
assert compiled.metadata.shared <= 227 * 1024
"""


@pytest.mark.parametrize(
    ("size", "power", "folded", "absent"),
    [
        (
            128,
            1,
            True,
            "key_turns=None, gain=None, key_factors=None, grad_key_bias=None, "
            "spans=None, table=None, starts=None, ends=None, keys=None",
        ),
        (64, 2, False, "key_factors=None, grad_key_bias=None, keys=None"),
        (128, 0, True, "key_turns=None, gain=None"),
    ],
)
def test_kernel_compiles_without_a_gpu(size: int, power: int, folded: bool, absent: str) -> None:
    script = _COMPILE.format(size=size, power=power, folded=folded, absent=absent)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@needs_hopper
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "size", "value_size"),
    [
        (name, *sizes)
        for name in CASES
        for sizes in [(64, 64), (128, 128), (64, 128), (128, 64)]
        if sizes[0] == sizes[1] or name in SQUARES
    ],
)
def test_matches_the_reference(name: str, size: int, value_size: int) -> None:
    check(problem_of(name, size, value_size=value_size))


@needs_hopper
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "causal",
        "two heads that share a tile of keys",
        "more heads than programs",
        "power 2, gain",
        "sinks",
        "square, key bias, causal",
    ],
)
def test_query_heads_that_share_sums(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bands(monkeypatch, 1)
    check(problem_of(name, size))


CAUSAL = {"is_causal": True}


@pytest.mark.parametrize(
    ("heads", "key_heads", "num_queries", "num_keys", "size", "options", "expected"),
    [
        # their rows would leave the cache
        (32, 8, 8192, 8192, 128, CAUSAL, True),
        (32, 8, 8192, 8192, 128, {}, True),
        (32, 8, 16384, 16384, 64, CAUSAL, True),
        (32, 8, 8192, 8192, 64, CAUSAL, False),
        # 16 of 132 programs for each key/value head
        (32, 8, 4096, 4096, 128, CAUSAL, True),
        (32, 8, 4096, 4096, 64, CAUSAL, False),
        # eight, and four with short rows
        (64, 16, 4096, 4096, 128, CAUSAL, False),
        (128, 32, 1024, 1024, 128, CAUSAL, False),
        # one query head for each key/value head, a window, queries without keys
        (8, 8, 65536, 65536, 128, CAUSAL, False),
        (32, 8, 8192, 8192, 128, {"is_causal": True, "sliding_window": 1024}, False),
        (32, 8, 8192, 4096, 128, CAUSAL, False),
    ],
)
def test_which_query_heads_share_sums(
    heads: int,
    key_heads: int,
    num_queries: int,
    num_keys: int,
    size: int,
    options: dict[str, Any],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def empty(heads: int, length: int) -> Tensor:
        return torch.empty(1, heads, length, size, dtype=BFLOAT16, device="meta")

    monkeypatch.setattr(gradient, "num_processors", lambda _: 132)
    problem = AttentionProblem(
        query=empty(heads, num_queries),
        key=empty(key_heads, num_keys),
        value=empty(key_heads, num_keys),
        response=Response("hill"),
        scale=1.0,
        **options,
    )
    assert gradient.is_shared(problem) is expected


@needs_hopper
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("magnitude", [1e-3, 30.0])
@pytest.mark.parametrize("name", ["causal", "gain", "small scale"])
def test_scores_of_any_size(name: str, magnitude: float) -> None:
    check(problem_of(name, 64, magnitude=magnitude))


@needs_hopper
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 40, 40, 2048, 2048, 64, 64),
        (1, 24, 6, 4096, 4096, 128, 128),
        (1, 24, 6, 8192, 8192, 128, 128),
        (1, 16, 2, 8192, 8192, 64, 64),
        # long enough for sweeps that are turned round
        (1, 2, 1, 40960, 40960, 128, 128),
    ],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_matches_the_portable_kernels_at_full_size(sizes: tuple[int, ...], is_causal: bool) -> None:
    """Several tiles a program, bands of heads, thousands of turns; and the same bits every time."""
    problem = Case("large", sizes, BFLOAT16, 1.0, {"is_causal": is_causal}).problem()
    grad_out = torch.randn_like(problem.query)
    seen = hopper.forward(problem)
    wanted = triton.backward(problem, *seen, grad_out, need_key_bias=False, need_bias=False)
    found = gradient.gradients(problem, *seen, grad_out)[:3]
    for one, other in zip(found, wanted, strict=False):
        assert largest_error(one, other) < 0.02 * float(other.abs().max())
    for _ in range(10):
        assert all(map(torch.equal, gradient.gradients(problem, *seen, grad_out)[:3], found))


@needs_hopper
def test_strides_are_free() -> None:
    problem = problem_of("causal", 64)
    strided = dataclasses.replace(problem, key=problem.key.mT.contiguous().mT)
    seen = hopper.forward(problem)
    grad_out = torch.randn(2, 300, 4, 64, device=DEVICE).to(BFLOAT16).transpose(1, 2)
    packed = gradient.gradients(problem, *seen, grad_out.contiguous())[:3]
    assert all(map(torch.equal, gradient.gradients(strided, *seen, grad_out)[:3], packed))
