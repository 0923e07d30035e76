"""Features and magnitudes of a decoder's cached keys, made again only where a key has changed.

Every step compares the keys with a copy of those that the features were made of, span by span, on the
device, so that the processor waits for nothing. Beams may be reordered, caches cropped or written in
place: what is compared are the values. A step reads the keys and the copy for it, which takes about as
long as its attention.

It holds a copy of the keys beside the features and magnitudes, with room for a quarter more positions.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import features_kernels, magnitude_kernels
from .features_kernels import SPAN, load_rows
from .host import launch
from .launch import ceil_div, power_of_two
from .tiles import row_place


@triton.jit
def compare_kernel(
    key,
    copy,
    changed,
    stale,
    heads,
    positions,
    rows,
    key_batch,
    key_head,
    key_position,
    key_size,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Marks a span whose keys are not those of the copy, and copies them.

    Where there are no keys now, a copy of earlier ones is kept as long as `changed` is 0.
    """
    flat_head = tl.program_id(0)
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < positions
    place = row_place(
        flat_head // heads, flat_head % heads, position, key_batch, key_head, key_position
    )
    now = load_rows(key, place, key_size, inside, DIM, BLOCK_D)
    row = (flat_head.to(tl.int64) * rows + position) * DIM
    before = load_rows(copy, row, 1, inside, DIM, BLOCK_D)
    differs = tl.max(tl.max((now != before).to(tl.int32), 1), 0) | tl.load(changed).to(tl.int32)
    tl.store(stale + flat_head * tl.cdiv(rows, BLOCK_N) + tl.program_id(1), differs)
    if differs != 0:
        size = tl.arange(0, BLOCK_D)
        places = row[:, None] + size[None, :]
        now = tl.where(inside[:, None], now, float("nan")).to(copy.dtype.element_ty)
        tl.store(copy + places, now, mask=(size < DIM)[None, :])


class CachedFeatures:
    """What was made of the keys of one layer.

    Args:
        key: (B, K, N, D), the keys of the first call.
        frequencies: (B or 1, K, S, D, M), float32.
    """

    def __init__(self, key: Tensor, frequencies: Tensor) -> None:
        batch, heads, positions, dim = key.shape
        rows = ceil_div(positions + positions // 4, SPAN) * SPAN
        # No key equals NaN, so nothing is taken for known before it was made.
        self.copy = key.new_full((batch, heads, rows, dim), float("nan"))
        self.features = key.new_empty((batch, heads, rows, 2 * frequencies.shape[-1]))
        self.magnitudes = torch.empty((batch, heads, rows), dtype=torch.float32, device=key.device)
        self.stale = torch.empty(
            (batch * heads, rows // SPAN), dtype=torch.int32, device=key.device
        )
        self.given: tuple[Tensor, Tensor | None] | None = None
        self.numbers: tuple[float, ...] = ()
        self.kind = _kind(key, frequencies)

    def fits(self, key: Tensor, frequencies: Tensor) -> bool:
        """Whether there is room for these keys and their features, and nobody else may be reading."""
        return self.kind == _kind(key, frequencies) and key.shape[2] <= self.copy.shape[2]

    def take_over(self, other: CachedFeatures) -> None:
        """Copies what another one of this kind, with room for fewer positions, holds."""
        rows = other.copy.shape[2]
        for ours, theirs in (
            (self.copy, other.copy),
            (self.features, other.features),
            (self.magnitudes, other.magnitudes),
        ):
            ours[:, :, :rows] = theirs
        self.given, self.numbers = other.given, other.numbers

    def refresh(
        self,
        key: Tensor,
        frequencies: Tensor,
        p: float | Tensor,
        factor: float,
        magnitude_factor: float,
    ) -> tuple[Tensor, Tensor]:
        """`features.fused_features` and `magnitude.fused_magnitude` of the keys, without gradients.

        Args:
            key: (B, K, N, D), which `fits`.
            frequencies: see the class. p, magnitude_factor: of the magnitudes; p one a head or for all.
            factor: multiplies the keys before their features are made.

        Returns:
            Views (B, K, N, 2M) and (B, K, N), valid until the caller's next call.
        """
        batch, heads, positions, dim = key.shape
        rows = self.copy.shape[2]
        exponents = p.float() if isinstance(p, Tensor) else None
        plain_p = 0.0 if isinstance(p, Tensor) else float(p)
        with torch.cuda.device_of(key):  # where Triton launches
            changed = self._changed(frequencies, exponents, (plain_p, factor, magnitude_factor))
            launch(
                compare_kernel,
                (batch * heads, rows // SPAN),
                key,
                self.copy,
                changed,
                self.stale,
                heads,
                positions,
                rows,
                *key.stride(),
                DIM=dim,
                BLOCK_N=SPAN,
                BLOCK_D=power_of_two(dim),
            )
            features_kernels.forward(key, frequencies, factor, self.features, self.stale)
            magnitude_kernels.forward(
                key, exponents, plain_p, magnitude_factor, self.magnitudes, self.stale
            )
        return self.features[:, :, :positions], self.magnitudes[:, :, :positions]

    def _changed(
        self, frequencies: Tensor, exponents: Tensor | None, numbers: tuple[float, ...]
    ) -> Tensor:
        """Whether what the results depend on beside the keys is new, int32 on the device."""
        before, self.numbers = self.numbers, numbers
        given = self.given
        # New tensors: those of inference mode must not be written outside of it.
        self.given = frequencies.clone(), None if exponents is None else exponents.clone()
        if (
            given is None
            or before != numbers
            or given[0].shape != frequencies.shape
            or (given[1] is None) != (exponents is None)
        ):
            return torch.ones((), dtype=torch.int32, device=frequencies.device)
        changed = (frequencies != given[0]).any()
        if exponents is not None and given[1] is not None:
            changed = changed | (exponents != given[1]).any()
        return changed.int()


def _kind(key: Tensor, frequencies: Tensor) -> Hashable:
    """What two calls must have in common, whatever the number of keys, for one to go on from the other.

    Among it who calls, the thread and its stream of work for the GPU: other calls may overlap.
    """
    batch, heads, _, dim = key.shape
    stream = torch.cuda.current_stream(key.device) if key.is_cuda else None
    sizes = batch, heads, dim, frequencies.shape[-1]
    return sizes, key.dtype, key.device, threading.get_ident(), stream
