"""What has been computed from each key, kept from one decoding step to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..ops.triton.cached_features import CachedFeatures


class _Kept(NamedTuple):
    key: Tensor
    given: tuple[Tensor, ...]
    results: tuple[Tensor, ...]


class KeyMemory:
    """Saves computing again, at every decoding step, what belongs to keys that a cache holds.

    A key is known again by its value, compared with a copy of the latest call's keys. So nothing is
    ever taken for another key: not after beams were reordered, not in a static cache that is written
    in place, not in a cropped cache or a new sequence; there the keys differ and are computed anew.

    It takes the memory of a second copy of the keys and of what was computed from them, until it is
    cleared or the next call replaces it. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._on_gpu: CachedFeatures | None = None

    def compute(
        self,
        function: Callable[[Tensor], tuple[Tensor, ...]],
        key: Tensor,
        given: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """`function(key)`, called with the keys only that are not those of the latest call.

        Args:
            function: keys (batch, heads, n, dim) to tensors (batch, heads, n, …), each position by
                itself.
            key: (batch, heads, keys, dim).
            given: everything else that the results depend on.
        """
        kept, self._kept = self._kept, None
        if kept is None or not _fits(kept, key, given):
            results = function(key)
            given = tuple(tensor.detach().clone() for tensor in given)
        else:
            results, given = _update(kept, function, key), kept.given
        self._kept = _Kept(key.clone(), given, results)
        return results

    def features(
        self,
        key: Tensor,
        frequencies: Tensor,
        p: float | Tensor,
        *,
        factor: float,
        magnitude_factor: float,
    ) -> tuple[Tensor, Tensor]:
        """Spectral features and L^p magnitudes of keys by the GPU's kernels, which compare as they go.

        Args: see `ops.triton.cached_features.CachedFeatures.refresh`, whose results these are.
        """
        from ..ops.triton.cached_features import CachedFeatures
        from ..ops.triton.features import batched_samples

        samples = batched_samples(frequencies)
        # Not there while it is worked on: what an interruption leaves half made is not used again.
        kept, self._on_gpu = self._on_gpu, None
        if kept is None or not kept.fits(key, samples):
            new = CachedFeatures(key, samples)
            if kept is not None and kept.kind == new.kind:
                new.take_over(kept)
            kept = new
        results = kept.refresh(key, samples, p, factor, magnitude_factor)
        self._on_gpu = kept
        return results

    def clear(self) -> None:
        self._kept = self._on_gpu = None

    def __reduce__(self) -> tuple[type[KeyMemory], tuple[()]]:
        return KeyMemory, ()


def _fits(kept: _Kept, key: Tensor, given: tuple[Tensor, ...]) -> bool:
    alike = kept.key.shape[:2] == key.shape[:2] and kept.key.dtype == key.dtype
    return (
        alike
        and len(kept.given) == len(given)
        and all(torch.equal(*pair) for pair in zip(kept.given, given, strict=True))
    )


def _update(
    kept: _Kept, function: Callable[[Tensor], tuple[Tensor, ...]], key: Tensor
) -> tuple[Tensor, ...]:
    num_keys = key.shape[2]
    shared = min(kept.key.shape[2], num_keys)
    is_new = torch.ones(num_keys, dtype=torch.bool)
    now, before = key[:, :, :shared], kept.key[:, :, :shared]
    # Mostly they all are as before, and asking that is cheaper than asking it of each.
    is_new[:shared] = False if torch.equal(now, before) else (now != before).any(3).any(1).any(0)
    new = is_new.nonzero().squeeze(1)
    if len(new) == num_keys:
        return function(key)
    results = []
    for old, computed in zip(kept.results, function(key[:, :, new]), strict=True):
        result = computed.new_empty(*computed.shape[:2], num_keys, *computed.shape[3:])
        result[:, :, :shared] = old[:, :, :shared]
        result[:, :, new] = computed
        results.append(result)
    return tuple(results)
