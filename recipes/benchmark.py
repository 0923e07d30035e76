"""Speed and memory of the attention implementations, each against its rivals in one run.

    python recipes/benchmark.py --device cpu
    python recipes/benchmark.py --device cuda
    python recipes/benchmark.py --device cuda --parts masked

On the CPU: expressive attention (blockwise) and the kernels of implicit kernel attention against
PyTorch's softmax attention and against the formula written naively. On a GPU: the Triton kernels, for
implicit kernel attention with and without its features and magnitudes, against cuDNN's and PyTorch's
flash softmax attention, flex_attention with the expressive score, and FlashAttention-4 where it is
installed; batches with masks over their visible share of a causal pass; how close decoding comes to the
bandwidth of a plain copy.

Nothing is timed before its outputs and gradients agree with the float64 reference. Rivals take turns, so
that a change of clock meets all of them; medians are reported with the 10th and 90th percentile. A GPU's
time is that of calls queued beforehand; what launching one costs the host is reported beside it. A short
call takes the longer of the two.
TFLOP/s count 4·B·H·S²·D a forward pass, half of it when causal, and 2.5 times that for a backward pass.
Results: recipes/results/benchmark_<device>.json and .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from hf_expressive import ImplicitKernelConfig
from hf_expressive.attention.base import AttentionCall
from hf_expressive.attention.implicit_kernel import ImplicitKernelAttention
from hf_expressive.ops import KeyRanges, expressive_attention
from hf_expressive.ops.functional import attend
from hf_expressive.ops.response import Response

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
RESULTS = Path(__file__).parent / "results"
PARTS = {"cpu": ("times", "memory"), "cuda": ("times", "masked", "memory")}
SQUARE = Response("square", epsilon=1e-5)
#: Calls queued at most, so that their launches fit the driver's queue; what a waiting GPU counts.
MOST_QUEUED = 40
CYCLES_A_SECOND = 2e9


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement; causal unless there is one query."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    size: int

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward pass."""
        total = 4.0 * self.batch * self.heads * self.queries * self.keys * self.size
        return total / 2 if self.queries > 1 else total

    def tensors(self, device: str, dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
        """Random query, key and value."""
        generator = torch.Generator(device).manual_seed(0)
        sizes = (
            (self.heads, self.queries),
            (self.key_heads, self.keys),
            (self.key_heads, self.keys),
        )
        return [
            torch.randn(
                self.batch,
                heads,
                length,
                self.size,
                generator=generator,
                device=device,
                dtype=dtype,
            ).requires_grad_(grad)
            for heads, length in sizes
        ]

    def __str__(self) -> str:
        heads = (
            f"{self.heads}/{self.key_heads}" if self.heads != self.key_heads else f"{self.heads}"
        )
        queries = f"Q{self.queries} " if self.queries != self.keys else ""
        return f"B{self.batch} H{heads} {queries}S{self.keys} D{self.size}"


# --- What is compared -------------------------------------------------------------------------------


def naive_expressive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Expressive attention as the formula reads, with all weights in memory."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    squared = (query @ key.mT * query.shape[-1] ** -0.5).square()
    weight = (squared / (1 + squared)).tril(key.shape[2] - query.shape[2])
    return (weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)) @ value


def ours(query: Tensor, key: Tensor, value: Tensor, *, power: int = 1, impl: Any) -> Tensor:
    """Expressive attention of this package."""
    is_causal = query.shape[2] > 1
    return expressive_attention(query, key, value, power=power, is_causal=is_causal, impl=impl)


@lru_cache(maxsize=2)
def _key_magnitude(key: Tensor) -> Tensor:
    return key.detach().float().square().sum(-1) / (2 * key.shape[-1] ** 0.5)


def implicit_kernel(query: Tensor, key: Tensor, value: Tensor, *, impl: Any) -> Tensor:
    """Implicit kernel attention's kernel: squared score, log-weight ‖k‖²/2√d made beforehand."""
    key_bias = _key_magnitude(key)
    return attend(
        query,
        key,
        value,
        response=SQUARE,
        key_bias=key_bias,
        is_causal=query.shape[2] > 1,
        impl=impl,
    )


#: Kernels of implicit kernel attention, compared on the CPU with features and magnitudes included.
KERNELS = ("rbf", "stationary", "direct", "implicit", "copula")


@cache
def _kernel_module(
    kernel: Any, heads: int, key_heads: int, size: int, device: torch.device
) -> ImplicitKernelAttention:
    child = ImplicitKernelAttention(
        ImplicitKernelConfig(kernel=kernel, p=3.0),
        layer=0,
        heads=heads,
        kv_heads=key_heads,
        head_dim=size,
    )
    child.reset_parameters()
    return child.eval().to(device)


def whole_kernel(query: Tensor, key: Tensor, value: Tensor, *, kernel: str, impl: Any) -> Tensor:
    """Implicit kernel attention as a model runs it, M = 64 and p = 3; gradients of q, k and v."""
    child = _kernel_module(kernel, query.shape[1], key.shape[1], query.shape[-1], query.device)
    is_causal = query.shape[2] > 1
    call = AttentionCall(query, key, value, query.shape[-1] ** -0.5, is_causal=is_causal, impl=impl)
    return child(call)[0]


def softmax(query: Tensor, key: Tensor, value: Tensor, *, backend: Any = None) -> Tensor:
    """PyTorch's fused softmax attention, by one backend or the one PyTorch picks."""
    from torch.nn.attention import sdpa_kernel

    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=query.shape[2] > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _expressive_score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    squared = score * score
    return torch.log(squared / (1 + squared))


def _is_causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


@cache
def _compiled_flex() -> Any:
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one program a shape, with and without gradients
    torch._functorch.config.donated_buffer = False  # the timed backward pass runs many times
    return torch.compile(flex_attention, dynamic=False)


@cache
def _causal_blocks(length: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_is_causal, None, None, length, length, device="cuda")


def flex_expressive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Expressive attention as softmax of log(z²/(1+z²)) by flex_attention."""
    result: Tensor = _compiled_flex()(
        query,
        key,
        value,
        score_mod=_expressive_score,
        block_mask=_causal_blocks(query.shape[2]),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result


def flash_attention_4(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention-4; its layout is (batch, length, heads, size)."""
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(
        *(x.transpose(1, 2) for x in (query, key, value)), causal=query.shape[2] > 1
    )
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def rivals(device: str) -> dict[str, Attention]:
    """Everything that is compared on a device."""
    if device == "cpu":
        return {
            "expressive, blockwise": partial(ours, impl="blockwise"),
            "softmax, sdpa": softmax,
            "expressive, naive": naive_expressive,
            **{
                f"kernel {kernel}": partial(whole_kernel, kernel=kernel, impl="blockwise")
                for kernel in KERNELS
            },
        }
    from torch.nn.attention import SDPBackend

    named: dict[str, Attention] = {
        "expressive": partial(ours, impl="auto"),
        "expressive power 2": partial(ours, power=2, impl="auto"),
        "implicit kernel": partial(implicit_kernel, impl="auto"),
        "kernel direct": partial(whole_kernel, kernel="direct", impl="auto"),
        "softmax, cuDNN": partial(softmax, backend=SDPBackend.CUDNN_ATTENTION),
        "softmax, flash": partial(softmax, backend=SDPBackend.FLASH_ATTENTION),
        "expressive, flex_attention": flex_expressive,
    }
    if torch.cuda.get_device_capability() == (9, 0):
        # Above, what covers this kind of GPU only; here, what others take.
        named["expressive, Triton"] = partial(ours, impl="triton")
        named["expressive power 2, Triton"] = partial(ours, power=2, impl="triton")
        named["implicit kernel, Triton"] = partial(implicit_kernel, impl="triton")
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError:
        return named
    return named | {"softmax, FlashAttention-4": flash_attention_4}


def reference_of(name: str) -> Attention:
    """What a rival has to compute, for float64 tensors."""
    if name.startswith("softmax"):
        return softmax
    if name.startswith("implicit"):
        return partial(implicit_kernel, impl="reference")
    if name.startswith("kernel "):
        kernel = name.removeprefix("kernel ").partition(",")[0]
        return partial(whole_kernel, kernel=kernel, impl="reference")
    return partial(ours, power=2 if "power 2" in name else 1, impl="reference")


@dataclass(frozen=True)
class Masked:
    """A batch of causal rows in which most pairs are hidden, as what follows is of the row's length.

    Args:
        documents: number of documents packed into each row.
        window: sliding window. padding: hidden tokens at the left.
        by_key: padding as a mask of keys, whose bounds are not known, instead of bounds of each query.
        shown: share of the keys that are not hidden, at random; a mask of keys, too.
    """

    name: str
    documents: int = 1
    window: float = 1.0
    padding: float = 0.0
    by_key: bool = False
    shown: float = 1.0

    def pairs(self, length: int) -> float:
        """Visible pairs of a row."""
        width, reach = length * (1 - self.padding) / self.documents, length * self.window
        full = width * (width + 1) / 2
        beyond = max(0.0, width - reach)
        return self.documents * (full - beyond * (beyond + 1) / 2) * self.shown

    def mask(self, batch: int, length: int) -> dict[str, Any]:
        """The mask as arguments of `expressive_attention`."""
        if self.window < 1.0:
            return {"is_causal": True, "sliding_window": int(length * self.window)}
        token = torch.arange(length, device="cuda", dtype=torch.int32)[None]
        if self.padding > 0.0:
            token = token.expand(batch, -1)
        if self.shown < 1.0:
            generator = torch.Generator("cuda").manual_seed(0)
            drawn = torch.rand(batch, length, generator=generator, device="cuda")
            return {
                "attention_mask": KeyRanges(torch.zeros_like(token), token + 1, drawn < self.shown)
            }
        if self.by_key:
            shown = token >= int(length * self.padding)
            return {"attention_mask": KeyRanges(torch.zeros_like(token), token + 1, shown)}
        document = length // self.documents
        start = token // document * document + int(length * self.padding)
        return {"attention_mask": KeyRanges(start, token + 1)}

    def own_rows(self, shape: Shape) -> Shape:
        """The same work with a row for each document and without padding."""
        length = int(shape.keys * (1 - self.padding)) // self.documents
        batch = shape.batch * self.documents
        return replace(shape, batch=batch, queries=length, keys=length)

    def flash(self, shape: Shape) -> tuple[Attention, list[Tensor]]:
        """FlashAttention-4's call for it, and its tensors: (tokens, heads, size), or rows of them."""
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        rows = self.own_rows(shape)
        tensors = [
            tensor.transpose(1, 2).contiguous() for tensor in rows.tensors("cuda", torch.bfloat16)
        ]

        def first(out: Any) -> Tensor:
            return out[0] if isinstance(out, tuple) else out

        if self.window < 1.0:
            reach = (int(shape.keys * self.window) - 1, 0)
            return lambda *x: first(flash_attn_func(*x, causal=True, window_size=reach)), tensors
        tensors = [tensor.flatten(0, 1) for tensor in tensors]
        ends = torch.arange(rows.batch + 1, device="cuda", dtype=torch.int32) * rows.keys
        lengths: dict[str, Any] = {"max_seqlen_q": rows.keys, "max_seqlen_k": rows.keys}
        lengths |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        return lambda *x: first(flash_attn_varlen_func(*x, causal=True, **lengths)), tensors


MASKED = (
    Masked("2 documents", documents=2),
    Masked("4 documents", documents=4),
    Masked("8 documents", documents=8),
    Masked("16 documents", documents=16),
    Masked("window of an eighth", window=1 / 8),
    Masked("half padding", padding=0.5),
    Masked("half padding, by key", padding=0.5, by_key=True),
    Masked("70 % of keys", by_key=True, shown=0.7),
)


def check(
    name: str,
    attention: Attention,
    device: str,
    dtype: torch.dtype,
    reference: Attention | None = None,
    shape: Shape | None = None,
) -> None:
    """Raises SystemExit unless output and gradients agree with the float64 reference."""
    if shape is None:
        # On a GPU enough work for the kernels that serve large calls only.
        shape = Shape(2, 4, 2, 384, 384, 64) if device == "cpu" else Shape(4, 16, 8, 2100, 2100, 64)
    rough = shape.tensors(device, dtype, grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in rough]
    out, expected = attention(*rough), (reference or reference_of(name))(*exact)
    grad = torch.randn_like(expected)
    found = [out, *torch.autograd.grad(out, rough, grad.to(dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad)]
    limit = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for what, a, b in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        error = float(((a.double() - b).norm() / b.norm()).detach())
        if not error < limit:
            raise SystemExit(
                f"{name}: {what} is off by {error:.2g} of its norm; nothing was measured."
            )


# --- Measuring --------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], device: str, least_seconds: float) -> tuple[float, float]:
    """Seconds of one call on the device, and those the host takes to launch it.

    Averaged over as many calls as take `least_seconds`. A GPU is kept busy with something else until all
    of them are queued, so that its time is that of the work, however slow the host.
    """
    if device == "cpu":
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        return seconds, seconds
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    start.record()
    run()
    end.record()
    host = time.perf_counter() - began
    end.synchronize()
    count = round(least_seconds / max(start.elapsed_time(end) / 1e3, 1e-6))
    count = min(max(1, count), MOST_QUEUED)
    patience = 2.0 * host * count
    for _ in range(4):
        torch.cuda._sleep(int(patience * CYCLES_A_SECOND))
        start.record()
        began = time.perf_counter()
        for _ in range(count):
            run()
        host = (time.perf_counter() - began) / count
        end.record()
        all_queued = not start.query()
        end.synchronize()
        if all_queued:
            break
        patience *= 2
    return start.elapsed_time(end) / 1e3 / count, host


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same GPU work as a CUDA graph, without the time that Python takes to launch it."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def passes(
    attention: Attention, tensors: list[Tensor], device: str
) -> dict[str, Callable[[], Any]]:
    """The calls that are timed: forward and, on a GPU, backward; on a CPU both together."""
    with torch.no_grad():
        out = attention(*tensors)
    runs: dict[str, Callable[[], Any]] = {"forward": torch.no_grad()(lambda: attention(*tensors))}
    if tensors[0].shape[2] == 1:
        runs["forward, graph"] = captured(runs["forward"])
        return runs
    grad = torch.randn_like(out)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    if device == "cpu":
        runs["forward + backward"] = lambda: torch.autograd.grad(attention(*leaves), leaves, grad)
        return runs
    graph = attention(*leaves)
    runs["backward"] = lambda: torch.autograd.grad(graph, leaves, grad, retain_graph=True)
    return runs


def peak_memory(attention: Attention, shape: Shape, dtype: torch.dtype) -> float:
    """MiB that forward and backward take on a GPU beyond their inputs."""
    tensors = shape.tensors("cuda", dtype, grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(*tensors)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on a GPU."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), "cuda", 0.05)[0] for _ in range(5)]
    return 2 * source.nbytes / statistics.median(seconds)


def highest_resident() -> float:
    """Largest resident size of this process so far in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    # Not ru_maxrss, which a child inherits from its parent on Linux.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def resident_memory(name: str, length: int) -> None:
    """Prints the MiB by which forward and backward raise the largest resident size of this process."""
    attention, shape = rivals("cpu")[name], Shape(1, 8, 8, length, length, 64)
    for small in (Shape(1, 8, 8, 128, 128, 64), shape):
        before = highest_resident()
        tensors = small.tensors("cpu", torch.float32, grad=True)
        held = 3 * sum(
            tensor.nbytes for tensor in tensors
        )  # inputs, their gradients, output and its own
        torch.autograd.grad(attention(*tensors).sum(), tensors)
    print(max(0.0, highest_resident() - before - held / 2**20))


def measure_masked(shape: Shape, repeats: int, with_flash: bool) -> list[dict[str, Any]]:
    """Batches with masks: times over the visible share of a causal pass of the same rows, and over
    those of the same work with a row for each document."""
    whole = Masked("causal")
    causal_pairs = whole.pairs(shape.keys)
    records: list[dict[str, Any]] = []
    unmasked: dict[tuple[str, str], float] = {}
    for case in (whole, *MASKED):
        if case in MASKED:
            few = Shape(4, 16, 8, 2048, 2048, 64)
            call, exact = (
                partial(expressive_attention, **case.mask(4, few.keys), impl=impl)
                for impl in ("auto", "reference")
            )
            check(f"expressive, {case.name}", call, "cuda", torch.bfloat16, exact, few)
        mask = case.mask(shape.batch, shape.keys) if case in MASKED else {"is_causal": True}
        calls: dict[str, tuple[Attention, list[Tensor]]] = {
            "expressive": (
                partial(expressive_attention, **mask),
                shape.tensors("cuda", torch.bfloat16),
            )
        }
        if case in MASKED and case.window == case.shown == 1.0:
            rows = case.own_rows(shape).tensors("cuda", torch.bfloat16)
            calls["own rows"] = partial(expressive_attention, is_causal=True), rows
        if with_flash and not case.by_key:
            calls["softmax, FlashAttention-4"] = case.flash(shape)
        runs = {
            (name, what): run
            for name, (attention, tensors) in calls.items()
            for what, run in passes(attention, tensors, "cuda").items()
        }
        turns: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for run in runs.values():
            run()
        for _ in range(repeats):
            for key, run in runs.items():
                turns[key].append(timed(run, "cuda", 0.02)[0])
        medians = {key: statistics.median(values) for key, values in turns.items()}
        if case is whole:
            unmasked = medians
        share = case.pairs(shape.keys) / causal_pairs
        for (name, what), seconds in medians.items():
            if name == "own rows":
                continue
            record: dict[str, Any] = {
                "shape": str(shape),
                "mask": case.name,
                "name": name,
                "pass": what,
            }
            record["milliseconds"] = round(seconds * 1e3, 4)
            record["share"] = round(share, 4)
            record["over_share"] = round(seconds / share / unmasked[name, what], 3)
            if name == "expressive" and ("own rows", what) in medians:
                record["over_own_rows"] = round(seconds / medians["own rows", what], 3)
            records.append(record)
        torch.cuda.empty_cache()
    return records


def measure(
    shape: Shape, chosen: dict[str, Attention], device: str, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """One record a rival and pass; the rivals take turns."""
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    failed: list[dict[str, Any]] = []
    for name, attention in chosen.items():
        try:
            for what, run in passes(attention, shape.tensors(device, dtype), device).items():
                run()
                runs[name, what] = run
        except (RuntimeError, torch.OutOfMemoryError) as error:
            failed.append({"shape": str(shape), "name": name, "error": str(error).splitlines()[0]})
    turns: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            turns[key].append(timed(run, device, 0.02))
    records = []
    for (name, what), pairs in turns.items():
        values, hosts = map(sorted, zip(*pairs, strict=True))
        median, host = statistics.median(values), round(statistics.median(hosts) * 1e3, 4)
        cost = {"backward": 2.5, "forward + backward": 3.5}.get(what, 1.0)
        records.append(
            {
                "shape": str(shape),
                **asdict(shape),
                "name": name,
                "pass": what,
                "milliseconds": round(median * 1e3, 4),
                "p10": round(values[len(values) // 10] * 1e3, 4),
                "p90": round(values[-1 - len(values) // 10] * 1e3, 4),
                **({"host_milliseconds": host} if device == "cuda" else {}),
                "tflops": float(f"{cost * shape.flops / median / 1e12:.4g}"),
            }
        )
    return records + failed


def run_cpu(
    parts: Sequence[str], repeats: int, longest: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Times at several lengths, memory up to `longest`: each of the parts with its results."""
    chosen = rivals("cpu")
    for name, attention in chosen.items():
        check(name, attention, "cpu", torch.float32)
    lengths = [length for length in (1024, 2048, 4096) if length <= longest]
    memory_lengths = [length for length in (2048, 4096, 8192, 16384) if length <= longest]
    times, memory = [], []
    if "times" in parts:
        for length in tqdm(lengths, desc="time"):
            shape = Shape(1, 8, 8, length, length, 64)
            times += measure(shape, chosen, "cpu", torch.float32, repeats)
        yield "times", {"times": times}
    if "memory" not in parts:
        return
    jobs = [
        (name, length)
        for name in chosen
        for length in memory_lengths
        if length <= 4096 or "naive" not in name
    ]
    for name, length in tqdm(jobs, desc="memory"):
        command = [sys.executable, __file__, "--resident-memory", name, str(length)]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        memory.append({"name": name, "keys": length, "MiB": round(float(child.stdout), 1)})
    yield "memory", {"memory": memory}


def run_cuda(
    parts: Sequence[str], repeats: int, longest: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Times of three standard shapes, of grouped heads at several lengths, of decoding; batches with
    masks; memory: each of the parts with its results."""
    dtype = torch.bfloat16
    named = rivals("cuda")
    used_by = {
        "times": set(named),
        "masked": {"expressive", "softmax, FlashAttention-4"},
        "memory": {name for name in named if "flex" not in name},
    }
    needed = set().union(*(used_by[part] for part in parts))
    chosen = {}
    for name, attention in tqdm(
        [item for item in named.items() if item[0] in needed], desc="check"
    ):
        try:
            check(name, attention, "cuda", dtype)
        except RuntimeError as error:
            if "softmax" not in name and "flex" not in name:
                raise
            print(f"{name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            chosen[name] = attention
    own = {n: run for n, run in chosen.items() if "softmax" not in n and "flex" not in n}
    without_flex = {name: run for name, run in chosen.items() if "flex" not in name}
    standard = [
        Shape(4, 16, 16, 4096, 4096, 128),
        Shape(4, 32, 32, 4096, 4096, 64),
        Shape(1, 16, 16, 16384, 16384, 128),
    ]
    lengths = [length for length in (2048, 4096, 8192, 16384, 32768, 65536) if length <= longest]
    grouped = [Shape(max(1, 16384 // length), 32, 8, length, length, 128) for length in lengths]
    decoding = [Shape(16, 32, 8, 1, 32768, 128), Shape(1, 32, 8, 1, 32768, 128)]
    if "times" in parts:
        times = []
        for shape in tqdm(standard + grouped + decoding, desc="time"):
            rounds = repeats if shape.keys <= 16384 else max(3, repeats // 4)
            used = chosen if shape in standard else without_flex
            if shape in decoding:
                used = {n: run for n, run in own.items() if "Triton" not in n}
                used["softmax, sdpa"] = softmax
            times += measure(shape, used, "cuda", dtype, rounds)
            torch.cuda.empty_cache()
        bandwidth = copy_bandwidth()
        for record in times:
            if record.get("queries") == 1 and "error" not in record:
                moved = 2 * record["batch"] * record["key_heads"] * record["keys"] * record["size"]
                rate = moved * dtype.itemsize / (record["milliseconds"] / 1e3)
                record["share_of_copy"] = round(rate / bandwidth, 3)
        yield "times", {"times": times, "copy_bytes_per_second": float(f"{bandwidth:.4g}")}
    if "masked" in parts:
        masked = []
        shapes = (
            Shape(4, 16, 16, 8192, 8192, 128),
            Shape(4, 32, 32, 8192, 8192, 64),
            Shape(1, 16, 16, 32768, 32768, 128),
        )
        for shape in tqdm(shapes, desc="masks"):
            masked += measure_masked(shape, repeats, "softmax, FlashAttention-4" in chosen)
        yield "masked", {"masked": masked}
    if "memory" in parts:
        memory = []
        for shape in tqdm(standard[:1] + grouped, desc="memory"):
            for name, attention in without_flex.items():
                peak = peak_memory(attention, shape, dtype)
                memory.append(
                    {"name": name, "shape": str(shape), "keys": shape.keys, "MiB": round(peak, 1)}
                )
        yield "memory", {"memory": memory}


# --- Reporting --------------------------------------------------------------------------------------


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    import triton

    if commit is None:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or "unknown"
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    return {
        "device": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def print_table(results: dict[str, Any]) -> None:
    """Times beside the first softmax rival of the same shape and pass."""
    rows = [record for record in results.get("times", []) if "error" not in record]
    for row in rows:
        same = [r for r in rows if (r["shape"], r["pass"]) == (row["shape"], row["pass"])]
        softmax_time = next(r["milliseconds"] for r in same if r["name"].startswith("softmax"))
        print(
            f"{row['shape']:28} {row['pass']:19} {row['name']:28} {row['milliseconds']:10.3f} ms "
            f"[{row['p10']:.3f}, {row['p90']:.3f}] {row['tflops']:8.3g} TFLOP/s "
            f"{softmax_time / row['milliseconds']:5.2f} × softmax"
            + (f", host {row['host_milliseconds']:.3f} ms" if "host_milliseconds" in row else "")
            + (f" {row['share_of_copy']:.2f} of a copy" if "share_of_copy" in row else "")
        )
    for record in results.get("times", []):
        if "error" in record:
            print(f"{record['shape']:28} {record['name']:28} failed: {record['error']}")
    for row in results.get("masked", []):
        print(
            f"{row['shape']:22} {row['mask']:20} {row['pass']:9} {row['name']:26} "
            f"{row['milliseconds']:8.3f} ms, {row['over_share']:.2f} × its share"
            + (f", {row['over_own_rows']:.2f} × own rows" if "over_own_rows" in row else "")
        )
    for row in results.get("memory", []):
        print(f"memory {row['keys']:6} keys {row['name']:28} {row['MiB']:10.1f} MiB")


def plot(results: dict[str, Any], path: Path) -> None:
    """Throughput against length, one panel a pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results["times"] if "error" not in r and r["queries"] > 1]
    heads = max({r["heads"] // r["key_heads"] for r in rows})
    rows = [r for r in rows if r["heads"] // r["key_heads"] == heads]
    kinds = list(dict.fromkeys(r["pass"] for r in rows))
    names = list(dict.fromkeys(r["name"] for r in rows))
    size = (5.5 * len(kinds) + 2.5, 4.2)
    figure, axes = pyplot.subplots(1, len(kinds), figsize=size, squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        for name in names:
            line = sorted(
                (r["keys"], r["tflops"]) for r in rows if (r["name"], r["pass"]) == (name, kind)
            )
            style = "--" if name.startswith("softmax") else ":" if "Triton" in name else "-"
            axis.plot(*zip(*line, strict=True), style, marker="o", markersize=4, label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("length")
        axis.set_ylabel("TFLOP/s")
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    sample = rows[0]
    figure.suptitle(
        f"{results['environments']['times']['device']}, "
        f"{sample['heads']}/{sample['key_heads']} heads of {sample['size']}, causal"
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what to measure on"
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns of each rival (default 9)")
    parser.add_argument(
        "--longest", type=int, default=65536, help="longest sequence (default 65536)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS["cuda"],
        help="measure these only and keep the others of the JSON file (default: all)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the JSON file and the plot"
    )
    parser.add_argument("--commit", help="commit to record (default: asks git)")
    parser.add_argument("--resident-memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.resident_memory is not None:
        resident_memory(options.resident_memory[0], int(options.resident_memory[1]))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch sees; use --device cpu.")
    parts = options.parts or PARTS[options.device]
    if unknown := sorted(set(parts) - set(PARTS[options.device])):
        parser.error(f"--parts {' '.join(unknown)} needs --device cuda.")
    run = run_cpu if options.device == "cpu" else run_cuda
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"benchmark_{options.device}.json"
    results: dict[str, Any] = {"environments": {}}
    if options.parts and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault("environments", {})
    around = environment(options.device, options.commit)
    # What is measured is kept, should a later part fail or run out of time.
    for part, found in run(parts, options.repeats, options.longest):
        results |= found
        results["environments"][part] = around
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if "times" in results:
            plot(results, path.with_suffix(".png"))
    print_table(results)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
