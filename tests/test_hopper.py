"""The Hopper kernels: against the float64 reference on such a GPU, compiled for one everywhere."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_device import DEVICE, GPU
from test_triton import Case, differentiable, plain
from tolerances import assert_within_budget
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hf_expressive.ops import expressive_attention, hopper, reference
from hf_expressive.ops.functional import choose
from hf_expressive.ops.hopper.launch import STAGES
from hf_expressive.ops.hopper.plan import KEYS, ROWS, plan
from hf_expressive.ops.layout import in_order_of
from hf_expressive.ops.problem import AttentionProblem, KeyRanges
from hf_expressive.ops.response import Response

HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
SQUARED = Response("hill", power=2.0)
SQUARE = Response("square", epsilon=1e-3)


def ranges(
    batch: int, queries: int, keys: int, start: Any, end: Any, shown: Any = None
) -> KeyRanges:
    """Ranges from functions of (sequence, query), both column vectors, and of (sequence, key)."""
    sequence = torch.arange(batch, device=DEVICE)[:, None]
    query = torch.arange(queries, device=DEVICE)[None]
    key = torch.arange(keys, device=DEVICE)[None]
    zero = torch.zeros(batch, queries, dtype=torch.int32, device=DEVICE)
    return KeyRanges(
        (start(sequence, query) + zero).int(),
        (end(sequence, query) + zero).int(),
        None if shown is None else shown(sequence, key) & (zero[:, :1] == 0),
    )


def lengths_of(*lengths: int) -> tuple[Tensor, Tensor]:
    """First position of each token's sequence and one past the last, of a packed row."""
    ends = torch.tensor(lengths).cumsum(0)
    start = torch.cat([torch.full((n,), int(e) - n) for n, e in zip(lengths, ends, strict=True)])
    end = torch.cat([torch.full((n,), int(e)) for n, e in zip(lengths, ends, strict=True)])
    return start.to(DEVICE), end.to(DEVICE)


FULL = (2, 4, 2, 300, 300)
PACKED = lengths_of(70, 1, 129, 100)
CASES = {
    "plain": (FULL, {}),
    "causal": (FULL, {"is_causal": True}),
    "one head, many tiles": ((1, 1, 1, 5000, 5000), {"is_causal": True}),
    "more heads than programs": ((3, 60, 4, 200, 200), {"is_causal": True}),
    "fewer queries than keys": ((1, 4, 4, 131, 777), {"is_causal": True}),
    "more queries than keys: empty rows": ((1, 2, 1, 400, 150), {"is_causal": True}),
    "two heads that share a tile of keys": ((1, 2, 1, 100, 128), {}),
    "one key": ((2, 2, 2, 100, 1), {}),
    "window": (FULL, {"is_causal": True, "sliding_window": 37}),
    "window of one": (FULL, {"is_causal": True, "sliding_window": 1}),
    "window both ways": (FULL, {"sliding_window": 90}),
    "power 2": (FULL, {"is_causal": True, "response": SQUARED}),
    "power 2, gain": (FULL, {"response": SQUARED, "gain": torch.tensor([0.3, 1.0, -2.0, 5.0])}),
    "gain": (FULL, {"is_causal": True, "gain": torch.tensor([0.1, 1.0, -3.0, 0.0])}),
    "sinks": (FULL, {"is_causal": True, "sinks": torch.tensor([-2.0, 0.0, 3.0, 90.0])}),
    "small scale": (FULL, {"scale": 1e-3}),
    "tiny scale": (FULL, {"scale": 1e-7}),
    "large scale": (FULL, {"scale": 1e6, "is_causal": True}),
    "left padding": (
        FULL,
        {"ranges": ranges(2, 300, 300, lambda b, q: 170 * b, lambda b, q: q + 1)},
    ),
    "right padding, bidirectional": (
        FULL,
        {"ranges": ranges(2, 300, 300, lambda b, q: 0 * b, lambda b, q: 300 - 111 * b)},
    ),
    "packed": (
        (1, 4, 2, 300, 300),
        {"ranges": ranges(1, 300, 300, lambda b, q: PACKED[0][q], lambda b, q: q + 1)},
    ),
    "packed, bidirectional, one pattern for both": (
        FULL,
        {"ranges": ranges(1, 300, 300, lambda b, q: PACKED[0][q], lambda b, q: PACKED[1][q])},
    ),
    "rows that see nothing": (
        FULL,
        {"ranges": ranges(2, 300, 300, lambda b, q: q, lambda b, q: q + (q % 3) * 20 * (1 - b))},
    ),
    "no row sees anything": (FULL, {"ranges": ranges(2, 300, 300, lambda b, q: q, lambda b, q: q)}),
    "half of the tiles see nothing": (
        (2, 4, 2, 1000, 1000),
        {"ranges": ranges(2, 1000, 1000, lambda b, q: 900 * b, lambda b, q: q + 1)},
    ),
    "hidden keys": (
        FULL,
        {
            "ranges": ranges(
                2,
                300,
                300,
                lambda b, q: 0 * q,
                lambda b, q: q + 1,
                lambda b, k: (k + b) % 5 > 1,
            )
        },
    ),
    "keys padded on both sides": (
        (2, 4, 2, 600, 600),
        {
            "ranges": ranges(
                2,
                600,
                600,
                lambda b, q: 0 * q,
                lambda b, q: q + 1,
                lambda b, k: (k >= 140 * b) & (k < 600 - 71 * b),
            )
        },
    ),
    "one pattern, keys of each sequence": (
        (3, 4, 2, 300, 300),
        {
            "ranges": KeyRanges(
                torch.zeros(1, 300, dtype=torch.int32, device=DEVICE),
                torch.full((1, 300), 300, dtype=torch.int32, device=DEVICE),
                # The second sequence sees no key, the others all but one.
                torch.tensor([True, False, True], device=DEVICE)[:, None]
                & (torch.arange(300, device=DEVICE)[None] != 150),
            )
        },
    ),
    "causal and ranges": (
        FULL,
        {
            "is_causal": True,
            "sliding_window": 64,
            "ranges": ranges(2, 300, 300, lambda b, q: 20 * b + 0 * q, lambda b, q: 290 + 0 * q),
        },
    ),
}
KEYED: dict[str, Any] = {"response": SQUARE, "key_bias": lambda draw: 3 * draw(2, 2, 300)}
CASES |= {
    "square": (FULL, {"response": SQUARE}),
    "square, key bias": (FULL, KEYED),
    "square, key bias, causal": (FULL, KEYED | {"is_causal": True, "scale": 1.0}),
    "square, key bias, window": (FULL, KEYED | {"is_causal": True, "sliding_window": 37}),
    "square, key bias, gain and sinks": (
        FULL,
        KEYED
        | {
            "is_causal": True,
            "gain": torch.tensor([0.1, 1.0, -3.0, 0.0]),
            "sinks": torch.tensor([-2.0, 0.0, 12.0, 90.0]),
        },
    ),
    "square, key bias, small scale, sinks": (
        FULL,
        KEYED | {"scale": 1e-3, "sinks": torch.tensor([-20.0, -10.0, 0.0, 90.0])},
    ),
    "square, one key": (
        (2, 2, 2, 100, 1),
        {"response": SQUARE, "key_bias": lambda draw: 50 + draw(2, 2, 1)},
    ),
    "square, fewer queries than keys": (
        (1, 4, 4, 131, 777),
        {"is_causal": True, "response": SQUARE, "key_bias": lambda draw: 3 * draw(1, 4, 777)},
    ),
    "square, constant weights": (
        FULL,
        KEYED | {"is_causal": True, "response": Response("square", epsilon=1e4)},
    ),
    "square, one head spreads widely": (
        FULL,
        {
            "is_causal": True,
            "response": SQUARE,
            "key_bias": lambda draw: (
                torch.linspace(0, 1, 300, device=DEVICE)
                * torch.tensor([[[400.0], [4.0]], [[-4.0], [50.0]]], device=DEVICE)
            ),
        },
    ),
}
for masked in ("left padding", "packed, bidirectional, one pattern for both", "hidden keys"):
    CASES[f"square, {masked}"] = (FULL, KEYED | CASES[masked][1])
CASES["square, rows that see nothing"] = (FULL, KEYED | CASES["rows that see nothing"][1])
SQUARES = [name for name in CASES if name.startswith("square")]


def problem_of(
    name: str,
    size: int,
    dtype: torch.dtype = torch.bfloat16,
    magnitude: float = 1.0,
    *,
    value_size: int | None = None,
) -> AttentionProblem:
    sizes, options = CASES[name]
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    if "sinks" in options:
        options["sinks"] = options["sinks"].view(1, -1, 1)
    return Case(name, (*sizes, size, value_size or size), dtype, magnitude, options).problem()


def as_in_models(problem: AttentionProblem) -> AttentionProblem:
    """The same operands as transposed views of (B, length, heads, size)."""
    views = {
        name: getattr(problem, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("query", "key", "value")
    }
    return dataclasses.replace(problem, **views)


def check(problem: AttentionProblem) -> None:
    """Output and log normaliser within the budget, the output in the order of the query."""
    assert hopper.unsupported(problem) is None
    expected, expected_log, _ = reference.attention(differentiable(problem, torch.float64))
    expected, expected_log = expected.detach(), expected_log.detach()
    out, log_normalizer = hopper.forward(problem)
    assert in_order_of(problem.query, out) is out
    assert_within_budget(out, expected, plain(problem), "out")
    seen = expected_log.isfinite()
    assert torch.equal(log_normalizer.isfinite(), seen)
    assert bool((log_normalizer[~seen] == -torch.inf).all())
    if bool(seen.any()):
        # A weight is the square of its score, and a score near zero is what cancelling products of
        # order one leave, each rounded to float32.
        found, wanted = log_normalizer[seen].double(), expected_log[seen]
        assert bool(((found - wanted).abs() < 1e-3 + 4e-6 * torch.exp(-wanted / 2)).all())


@needs_hopper
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str, size: int) -> None:
    check(problem_of(name, size))


#: With rows and tiles that see nothing, which kernels of their own write.
TRANSPOSED = ("causal", "half of the tiles see nothing", "square, key bias, causal")


@needs_hopper
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", TRANSPOSED)
def test_operands_may_be_transposed_views(name: str) -> None:
    check(as_in_models(problem_of(name, 64)))


@needs_hopper
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", SQUARES)
def test_matches_the_reference_with_values_of_another_size(name: str, size: int) -> None:
    check(problem_of(name, size, value_size=192 - size))


@needs_hopper
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", ["causal", "power 2", "small scale"])
def test_matches_the_reference_in_float16(name: str, magnitude: float) -> None:
    check(problem_of(name, 64, torch.float16, magnitude))


@needs_hopper
def test_scores_are_clamped_or_loudly_wrong() -> None:
    large = problem_of("causal", 64, magnitude=1e8)
    check(large)
    check(problem_of("power 2", 64, magnitude=1e8))
    beyond = dataclasses.replace(large, query=large.query * 1e12, key=large.key * 1e12)
    assert bool(hopper.forward(beyond)[0].isnan().any())
    squared = dataclasses.replace(beyond, response=SQUARED)
    assert bool(hopper.forward(squared)[0].isfinite().all())


@needs_hopper
def test_strides_are_free() -> None:
    problem = problem_of("causal", 64)
    strided = dataclasses.replace(
        problem,
        query=problem.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=problem.key.mT.contiguous().mT,
        value=problem.value[:, :1].expand(-1, 2, -1, -1),
    )
    packed = dataclasses.replace(strided, value=strided.value.contiguous())
    assert torch.equal(hopper.forward(strided)[0], hopper.forward(packed)[0])


@needs_hopper
def test_results_repeat_bit_for_bit() -> None:
    problem = problem_of("more heads than programs", 128)
    first = hopper.forward(problem)
    for _ in range(20):
        assert all(map(torch.equal, hopper.forward(problem), first))


@needs_hopper
def test_a_captured_graph_follows_its_inputs() -> None:
    problem = problem_of("left padding", 128)
    hopper.forward(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = hopper.forward(problem)
    problem.query.normal_()
    graph.replay()
    graph.replay()
    assert torch.equal(out, hopper.forward(problem)[0])


@needs_hopper
@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1},
        {"softcap": 30.0},
        {"response": Response("hill", power=3.0)},
        {"response": Response("exp")},
        {"bias": torch.zeros(1)},
        {"mask": torch.ones(1)},
        {"key_bias": torch.zeros(1)},
        {"value": torch.zeros(2, 2, 300, 128)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_covered_is_refused_by_name(change: dict[str, Any]) -> None:
    problem = dataclasses.replace(problem_of("plain", 64), **change)
    with pytest.raises(NotImplementedError, match="impl='hopper' does not cover this call"):
        choose(problem, "hopper")


def test_auto_takes_them_for_large_problems() -> None:
    few = problem_of("causal", 64)
    query = few.query[:, :, :1].expand(-1, -1, 2**18, -1)
    many = dataclasses.replace(few, query=query, ranges=None)
    assert hopper.is_faster(many)
    assert not hopper.is_faster(few)
    assert choose(few, "auto") == ("triton" if GPU else "blockwise")
    assert choose(many, "auto") == ("hopper" if HOPPER else "triton" if GPU else "blockwise")
    assert not hopper.is_faster(dataclasses.replace(many, sliding_window=1))
    square = dataclasses.replace(many, response=Response("square"))
    assert hopper.is_faster(square)
    for problem, faster in ((many, True), (square, False)):
        middle = dataclasses.replace(problem, query=query[:, :, : 2**16])
        assert hopper.is_faster(middle) == faster
    capped = dataclasses.replace(many, softcap=30.0)
    assert choose(capped, "auto") == ("triton" if GPU else "blockwise")


def test_an_explanation_speaks_of_a_long_call() -> None:
    length = importlib.import_module("hf_expressive.explain")._LENGTH
    query = problem_of("plain", 64).query[:1, :1, :1].expand(-1, -1, length, -1)
    problem = AttentionProblem(
        query=query, key=query, value=query, response=Response("hill"), scale=1.0, is_causal=True
    )
    assert hopper.is_faster(problem)


class _Attention(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return expressive_attention(query, key, value, is_causal=True)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Tensor, ...]]:
    """Query, key and value without memory on a Hopper GPU that need not exist."""
    monkeypatch.setattr(hopper, "_capability", lambda device: (9, 0))
    torch.compiler.reset()
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        yield tuple(
            torch.empty(4, 16, 4096, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)
        )


def taken(graph: torch.fx.Graph) -> list[Any]:
    return [node.args[-1] for node in graph.nodes if "attention_forward" in str(node.target)]


def test_auto_compiles_into_one_graph_without_a_warning(pretended: tuple[Tensor, ...]) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    torch.compile(_Attention(), fullgraph=True, backend=backend)(*pretended)
    assert [taken(graph) for graph in graphs] == [["hopper"]]


def test_lengths_compile_into_a_graph_for_long_and_one_for_short_calls(
    pretended: tuple[Tensor, ...],
) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(taken(graph.graph))
        return graph.forward

    compiled = torch.compile(_Attention(), fullgraph=True, dynamic=True, backend=backend)
    for length in (4096, 1024, 300, 3000, 2047):
        compiled(*(tensor.new_empty(4, 16, length, 64) for tensor in pretended))
    assert graphs == [["hopper"], ["triton"]]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_for_any_gpu_and_length(
    pretended: tuple[Tensor, ...], strict: bool
) -> None:
    length = torch.export.Dim("length", min=2, max=8192)
    shapes = ({2: length},) * 3
    program = torch.export.export(_Attention(), pretended, dynamic_shapes=shapes, strict=strict)
    assert taken(program.graph) == ["triton"]


def test_gpus_of_another_make_are_refused(
    pretended: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = pretended
    problem = AttentionProblem(
        query=query, key=key, value=value, response=Response("hill"), scale=1.0
    )
    assert hopper.unsupported(problem) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in str(hopper.unsupported(problem))


@pytest.mark.skipif(HOPPER, reason="this machine has a Hopper GPU")
def test_other_devices_are_refused_by_name() -> None:
    problem = problem_of("plain", 64)
    with pytest.raises(NotImplementedError, match="Hopper kernels"):
        choose(problem, "hopper")


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from hf_expressive.ops.hopper.tiled_forward import forward_kernel as kernel

def tiles(rows, size={size}):
    block = [1, 1, rows, size]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return f"tensordesc<bf16{{block}},{{layout!r}}>".replace(", ", ",", 3)

constants = dict(HALF=64, KEYS=128, STAGES={stages}, POWER={power}, FOLDED={folded}, LIFT=1.0,
                 {absent})
types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
types |= dict(query_tiles=tiles(64), key_tiles=tiles(128))
types |= dict(value_tiles=tiles(128, {value_size}), out_tiles=tiles(64, {value_size}))
types |= dict(log_normalizer="*fp32", table="*i32", bounds="*i32", counter="*i32", scale="fp32")
types |= dict(common_level="fp32", epsilon="fp32")
optional = dict(gain="*fp32", sinks="*fp32", keys="*u8", levels="*fp32")
optional |= dict(factor_tiles=f"tensordesc<fp32[1,128],{{gl.NVMMASharedLayout(0, 32, 2)!r}}>")
types |= {{name: kind for name, kind in optional.items() if name not in constants}}
places = {{(kernel.arg_names.index(name),): value for name, value in constants.items()}}
compiled = compile(GluonASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32),
                   options=dict(num_warps=4))
assembly = compiled.asm["ptx"]
assert "wgmma.mma_async" in assembly and "setmaxnreg" in assembly and "cp.async.bulk" in assembly
assert compiled.metadata.shared <= 227 * 1024
"""


@pytest.mark.parametrize(
    ("size", "value_size", "power", "folded", "absent"),
    [
        (128, 128, 1, True, "gain=None, sinks=None, keys=None, levels=None, factor_tiles=None"),
        (64, 64, 2, False, "levels=None, factor_tiles=None"),
        (128, 64, 0, True, "gain=None, sinks=None, keys=None"),
        (64, 128, 0, False, ""),
    ],
)
def test_kernel_compiles_without_a_gpu(
    size: int, value_size: int, power: int, folded: bool, absent: str
) -> None:
    script = _COMPILE.format(
        size=size,
        value_size=value_size,
        stages=STAGES[size, value_size],
        power=power,
        folded=folded,
        absent=absent,
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@needs_hopper
@pytest.mark.parametrize("name", ["causal", "power 2, gain", "sinks", "packed"])
def test_gradients_follow_from_this_output(name: str) -> None:
    problem = problem_of(name, 128)
    exact, rough = (differentiable(problem, dtype) for dtype in (torch.float64, torch.bfloat16))
    grad_out = torch.randn_like(problem.query)
    reference.attention(exact)[0].backward(grad_out.double())
    plain(rough).backward(grad_out)
    found = hopper.backward(
        problem, *hopper.forward(problem), grad_out, need_key_bias=False, need_bias=False
    )
    for name, gradient in zip(("query", "key", "value"), found, strict=False):
        wanted, near = getattr(exact, name).grad, getattr(rough, name).grad
        assert_within_budget(gradient, wanted, near, f"gradient of {name}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CASES)
def test_plan_bounds_what_is_visible(name: str) -> None:
    """Bounds of every query, and of tiles and half tiles; the interpreter serves without a GPU."""
    problem = problem_of(name, 64)
    queries, keys, ranges = problem.query.shape[2], problem.key.shape[2], problem.ranges
    start, end = problem.static_bounds(torch.arange(queries, device=DEVICE)[None])
    if ranges is not None:
        start, end = torch.maximum(start, ranges.start), torch.minimum(end, ranges.end)
    unbroken = [keys] * len(start)
    if ranges is not None and ranges.keys is not None:
        count = max(len(start), len(ranges.keys))
        start, end = start.expand(count, -1).clone(), end.expand(count, -1).clone()
        unbroken = []
        for row, shown in enumerate(ranges.keys.expand(count, -1).tolist()):
            seen_keys = [key for key in range(keys) if shown[key]] or [keys]
            start[row].clamp_(min=seen_keys[0])
            end[row].clamp_(max=seen_keys[-1] + 1 if any(shown) else 0)
            hidden = [key for key in range(seen_keys[0], keys) if not shown[key]]
            unbroken.append(min([*hidden, seen_keys[-1] + 1]) if any(shown) else 0)
    tables = plan(problem)
    # An end below the first key says the same as 0.
    ends, tiles = tables.rows[1].clamp(min=0), tables.tiles.clamp(min=0)
    assert tables.patterns == len(start)
    assert torch.equal(tables.rows[0, :, :queries].long(), start.long())
    assert torch.equal(ends[:, :queries].long(), end.long())
    for pattern, tile in itertools.product(range(tables.patterns), range(tables.count)):
        first, last, *inner = tiles[pattern, tile].tolist()
        place = slice(tile * ROWS, (tile + 1) * ROWS)
        low, high = start[pattern, place], end[pattern, place]
        seen = low < high
        if bool(seen.any()):
            assert (first, last) == (int(low[seen].min()), int(high[seen].max()))
        else:
            assert last == 0
            assert 0 <= first < keys
        for half in range(2):
            rows = slice(half * ROWS // 2, (half + 1) * ROWS // 2)
            if len(low[rows]):
                common = (int(low[rows].max()), int(high[rows].min()))
                expected = [common[0], min(common[1], unbroken[pattern])]
                assert inner[2 * half : 2 * half + 2] == expected
                if ranges is not None and ranges.keys is not None:
                    count = int(
                        ranges.keys.expand(tables.patterns, -1)[pattern, slice(*common)].sum()
                    )
                    assert min(inner[4 + half], KEYS) == min(count, KEYS)


@needs_hopper
def test_explain_says_what_runs() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    import hf_expressive

    config = LlamaConfig(
        hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="expressive")
    half = model.to(DEVICE, torch.bfloat16)
    assert [row.implementation for row in hf_expressive.explain(half).layers] == ["hopper"]
    full = model.to(torch.float32)
    assert [row.implementation for row in hf_expressive.explain(full).layers] == ["triton"]
