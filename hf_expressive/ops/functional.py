"""Validation, choice of implementation, dispatch: the public tensor functions.

`impl` names:

* `"reference"`: dense, O(Q·N) memory, differentiable any number of times. The specification.
* `"blockwise"`: plain torch in tiles, O(N) memory; every device.
* `"triton"`: fused kernels; CUDA (or Triton's interpreter). Raises where a problem is not covered.
* `"hopper"`: kernels for GPUs of compute capability 9.0 and the commonest cases; raises otherwise.
* `"auto"`: for CUDA tensors the first of `"hopper"`, where that is faster (`hopper.is_faster`), and
  `"triton"` that covers the call; `"blockwise"` for everything else.
  An exported program, which other GPUs and lengths may meet, never holds `"hopper"`; one for ONNX, which
  has no operator of ours, holds `"reference"`.

An implementation asked for by name runs or raises; it is never replaced by another.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from . import hopper, library, reference, triton
from .dropout import draw_seed
from .problem import AttentionProblem, KeyRanges
from .response import Response

Implementation = Literal["auto", "reference", "blockwise", "triton", "hopper"]
IMPLEMENTATION_NAMES: tuple[str, ...] = ("auto", "reference", "blockwise", "triton", "hopper")
_KERNELS = {"hopper": hopper, "triton": triton}


def expressive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    power: float = 1.0,
    is_causal: bool = False,
    attention_mask: Tensor | KeyRanges | None = None,
    bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    impl: Implementation = "auto",
) -> Tensor:
    """Expressive attention: row-normalised weights z²ⁿ / (1 + z²ⁿ), z = scale · q·k.

        w_ij = z_ij²ⁿ / (1 + z_ij²ⁿ) · exp(bias_ij) · visible_ij
        out_i = Σ_j w_ij v_j / (exp(sink) + Σ_j w_ij)

    A row that sees no key, or only keys of weight zero, gives exactly zero and a zero gradient.

    Args:
        query: (batch, heads, query, dim).
        key: (batch, key/value heads, keys, dim); heads is a multiple of key/value heads.
        value: (batch, key/value heads, keys, value dim).
        scale: a number, a tensor (heads,) for a learned gain a head, or `None` for dim^-½. The paper
            uses 1.
        power: the Hill exponent n > 0; 1 is the paper's.
        is_causal: query i sees key j iff j ≤ i + keys − queries: the last query is aligned with the
            last key.
        attention_mask: visibility, each dimension of (batch, heads, query, keys) or 1. Bool or
            integer: true or non-zero is visible. Float: added to the log-weight; −9000 and below
            hides the key. `KeyRanges`: the same in linear memory. `None`: everything is visible.
        bias: added to the log-weight (ALiBi, T5 position bias), each dimension of
            (batch, heads, query, keys) or 1; differentiable.
        sliding_window: only keys less than this many positions from the (aligned) query are visible.
        softcap: z ← softcap · tanh(z / softcap).
        sinks: log-weight of a sink that takes part in the normalisation only, (heads,) or
            (batch, heads, query, 1) with sizes 1 allowed.
        dropout: probability with which a normalised weight is dropped.
        impl: see the module's docstring.

    Returns:
        (batch, heads, query, value dim) in the dtype of `query`; heads lie within positions in memory
        where those of `query` do. Scores, weights and sums are computed in float32, or float64 for
        float64 inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.
        NotImplementedError: `impl` names an implementation that does not cover the call.

    Source: C. Gros, "Reorganizing attention-space geometry with expressive attention",
    arXiv 2407.18601.
    """
    return attend(
        query,
        key,
        value,
        response=Response("hill", power=float(power)),
        scale=scale,
        is_causal=is_causal,
        attention_mask=attention_mask,
        bias=bias,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
        impl=impl,
    )


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    response: Response,
    scale: float | Tensor | None = ...,
    key_bias: Tensor | None = ...,
    is_causal: bool = ...,
    attention_mask: Tensor | KeyRanges | None = ...,
    bias: Tensor | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout: float = ...,
    impl: Implementation = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    response: Response,
    scale: float | Tensor | None = ...,
    key_bias: Tensor | None = ...,
    is_causal: bool = ...,
    attention_mask: Tensor | KeyRanges | None = ...,
    bias: Tensor | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout: float = ...,
    impl: Implementation = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    response: Response,
    scale: float | Tensor | None = None,
    key_bias: Tensor | None = None,
    is_causal: bool = False,
    attention_mask: Tensor | KeyRanges | None = None,
    bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    impl: Implementation = "auto",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Any member of the family: `expressive_attention` with the response g as an argument.

    Args:
        response: g; the other arguments are those of `expressive_attention`.
        key_bias: log-magnitude of each key, (batch, key/value heads, keys).
        return_weights: also return the normalised weights (batch, heads, query, keys), which takes
            O(query · keys) memory and the reference implementation.

    Raises:
        ValueError, NotImplementedError: as `expressive_attention`.
    """
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    problem = _problem(
        query,
        key,
        value,
        response=response,
        scale=scale,
        key_bias=key_bias,
        is_causal=is_causal,
        attention_mask=attention_mask,
        bias=bias,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
    )
    chosen = choose(problem, impl, return_weights=return_weights)
    if chosen == "reference":
        with library.without_autocast(query):
            out, _, weights = reference.attention(problem)
        return (out, weights) if return_weights else out
    return library.attention(problem, chosen)[0]


def choose(problem: AttentionProblem, impl: str, *, return_weights: bool = False) -> str:
    """The implementation that runs a problem under the rules of the module's docstring.

    Raises:
        ValueError: unknown name.
        NotImplementedError: the named implementation does not cover the problem.
    """
    if impl not in IMPLEMENTATION_NAMES:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATION_NAMES)}; got {impl!r}.")
    if return_weights:
        if impl not in ("auto", "reference"):
            raise NotImplementedError(
                f"impl={impl!r} never holds the weights and cannot return them; use "
                "impl='reference' or 'auto'."
            )
        return "reference"
    if impl == "auto":
        if torch.onnx.is_in_onnx_export():
            return "reference"
        if not problem.query.is_cuda:
            return "blockwise"
        if not is_exporting() and hopper.unsupported(problem) is None and hopper.is_faster(problem):
            return "hopper"
        return "triton" if triton.unsupported(problem) is None else "blockwise"
    if impl in _KERNELS and (reason := _KERNELS[impl].unsupported(problem)) is not None:
        raise NotImplementedError(f"impl={impl!r} does not cover this call: {reason}")
    return impl


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` traces; asked out of traced code, where PyTorch 2.11 says yes always."""
    return torch.compiler.is_exporting()


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    response: Response,
    scale: float | Tensor | None,
    key_bias: Tensor | None,
    is_causal: bool,
    attention_mask: Tensor | KeyRanges | None,
    bias: Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> AttentionProblem:
    """Validates every argument and brings it into the form that `AttentionProblem` documents."""
    _check_operands(query, key, value)
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    full = (batch, heads, num_queries, num_keys)

    gain = None
    factor = head_dim**-0.5
    if isinstance(scale, Tensor):
        if scale.shape != (heads,):
            raise ValueError(
                f"scale must be a number or a tensor ({heads},), got shape {tuple(scale.shape)}."
            )
        gain, factor = scale.to(_compute_dtype(query)), 1.0
    elif scale is not None:
        factor = float(scale)
        if not -math.inf < factor < math.inf:
            raise ValueError(f"scale must be finite, got {scale!r}.")

    if key_bias is not None:
        if key_bias.shape != (batch, kv_heads, num_keys):
            raise ValueError(
                f"key_bias must be (batch, key/value heads, keys) = {(batch, kv_heads, num_keys)}, "
                f"got {tuple(key_bias.shape)}."
            )
        key_bias = key_bias.to(_compute_dtype(query))

    mask: Tensor | None = None
    ranges: KeyRanges | None = None
    if isinstance(attention_mask, KeyRanges):
        ranges = attention_mask
        _check_ranges(ranges, batch, num_queries, num_keys)
    elif attention_mask is not None:
        _check_broadcast("attention_mask", attention_mask, full)
        if attention_mask.is_floating_point():
            bias = attention_mask if bias is None else bias + attention_mask
        else:
            mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    if bias is not None:
        _check_broadcast("bias", bias, full)
        if not bias.is_floating_point():
            raise ValueError(
                f"bias must be floating point, got {bias.dtype}; a mask goes into attention_mask."
            )

    if sinks is not None:
        given = tuple(sinks.shape)
        sinks = sinks[None, :, None, None] if sinks.dim() == 1 else sinks
        if sinks.dim() != 4 or sinks.shape[3] != 1 or not _broadcasts(sinks, (*full[:3], 1)):
            raise ValueError(
                f"sinks must be ({heads},) or ({batch} or 1, {heads} or 1, {num_queries} or 1, 1), "
                f"got {given}."
            )
        sinks = sinks[..., 0]
    if sliding_window is not None and not (isinstance(sliding_window, int) and sliding_window >= 1):
        raise ValueError(f"sliding_window must be an integer ≥ 1 or None, got {sliding_window!r}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive finite number or None, got {softcap}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}.")

    return AttentionProblem(
        query=query,
        key=key,
        value=value,
        response=response,
        scale=factor,
        gain=gain,
        key_bias=key_bias,
        bias=bias,
        mask=mask,
        ranges=ranges,
        is_causal=bool(is_causal),
        sliding_window=sliding_window,
        softcap=None if softcap is None else float(softcap),
        sinks=sinks,
        dropout=float(dropout),
        seed=draw_seed(query.device) if dropout > 0.0 else None,
    )


def _autocast(tensor: Tensor) -> Tensor:
    """Operands as a stock attention function gets them under autocast; float64 is left alone."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions (batch, heads, length, dim), "
                f"got shape {tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}.")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}."
        )
    if (
        query.shape[0] != key.shape[0]
        or key.shape[:3] != value.shape[:3]
        or query.shape[3] != key.shape[3]
    ):
        raise ValueError(
            "query (batch, heads, query, dim), key (batch, kv heads, keys, dim) and value "
            "(batch, kv heads, keys, value dim) do not fit: "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(
            f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key/value heads."
        )


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.dim() == len(shape) and all(
        size in (1, wanted) for size, wanted in zip(tensor.shape, shape, strict=True)
    )


def _check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not _broadcasts(tensor, shape):
        raise ValueError(
            f"{name} must be (batch, heads, query, keys) = {shape} with sizes of 1 allowed, "
            f"got {tuple(tensor.shape)}."
        )


def _check_ranges(ranges: KeyRanges, batch: int, num_queries: int, num_keys: int) -> None:
    fits = all(
        tensor.dim() == 2 and tensor.shape[0] in (1, batch) and tensor.shape[1] == num_queries
        for tensor in (ranges.start, ranges.end)
    )
    if ranges.keys is not None:
        fits = fits and ranges.keys.dim() == 2
        fits = fits and ranges.keys.shape[0] in (1, batch) and ranges.keys.shape[1] == num_keys
    parts = (ranges.start, ranges.end, ranges.keys)
    if not fits:
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        raise ValueError(
            f"attention_mask: KeyRanges must hold start and end (batch or 1, {num_queries}) and keys "
            f"(batch or 1, {num_keys}) for batch {batch}, got {shapes}."
        )
    integers = all(part.dtype in (torch.int32, torch.int64) for part in (ranges.start, ranges.end))
    if not integers or (ranges.keys is not None and ranges.keys.dtype != torch.bool):
        dtypes = [None if part is None else part.dtype for part in parts]
        raise ValueError(
            "attention_mask: KeyRanges must hold start and end as int32 or int64 and keys as bool, "
            f"got {dtypes}."
        )
