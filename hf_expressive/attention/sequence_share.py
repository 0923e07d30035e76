"""One sequence over several processes: what of it a process holds, and the exchange around attention.

N positions are cut into 2P chunks, P the number of processes; process r holds chunks r and 2P − 1 − r.
Under a causal mask all processes then have nearly the same work, which contiguous shares would not
give: the last of them would have almost twice the mean.

Queries stay where they are. Keys and values are gathered, so every row is evaluated whole and nothing
that a mechanism, a mask or a sink may do needs to know of the exchange; in the backward pass the
gradients of keys and values are summed into the processes that own them. (Partial sums of disjoint
key ranges could travel instead, because numerators and denominators add. With grouped heads keys and
values are smaller than queries and partial results, and decoding is not what sequences are shared
for.) A layer holds the gathered keys and values until its backward pass, or, under gradient
checkpointing, during its recomputation only.

Layout and gathering of keys follow Llama Team, "The Llama 3 herd of models", arXiv 2407.21783,
section 3.3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from ..masking import CompactMask, compact_mask, intersect
from ..ops import KeyRanges

#: Keywords that speak of positions and reach attention as a process' own part only.
_REFUSED = {
    "position_bias": "a bias of pairs of positions is not exchanged; this architecture cannot share "
    "its sequences",
    "indices": "selected keys are not exchanged; this architecture cannot share its sequences",
    "block_indices": "selected keys are not exchanged; this architecture cannot share its sequences",
    "cu_seq_lens_q": "tell packed sequences apart by position_ids",
}


@dataclass(frozen=True, eq=False)
class SequenceShare:
    """A process' share of the positions of one batch.

    Args:
        group: the processes that share the batch.
        length: N, positions of the whole sequence, at least 2P.
        device: of the tensors that are exchanged.
        packing: for each query of the whole sequence the keys of its own packed sequence, or `None`.
    """

    group: dist.ProcessGroup
    length: int
    device: torch.device
    packing: KeyRanges | None = None

    @property
    def processes(self) -> int:
        return self.group.size()

    def chunks(self, rank: int) -> list[tuple[int, int]]:
        """First position and end of the two chunks that a process holds, in order."""
        cuts = [i * self.length // (2 * self.processes) for i in range(2 * self.processes + 1)]
        return [(cuts[i], cuts[i + 1]) for i in (rank, 2 * self.processes - 1 - rank)]

    @cached_property
    def own(self) -> list[tuple[int, int]]:
        """The chunks of this process."""
        return self.chunks(self.group.rank())

    @cached_property
    def own_length(self) -> int:
        """Positions that this process holds; processes may differ by one or two."""
        return sum(end - start for start, end in self.own)

    @cached_property
    def _longest(self) -> int:
        return max(
            sum(end - start for start, end in self.chunks(rank)) for rank in range(self.processes)
        )

    @cached_property
    def _places(self) -> Tensor:
        """Where each position of the sequence lies among the shares, one after the other, (N,)."""
        places = torch.empty(self.length, dtype=torch.int64)
        for rank in range(self.processes):
            place = rank * self._longest
            for start, end in self.chunks(rank):
                places[start:end] = torch.arange(place, place + end - start)
                place += end - start
        return places.to(self.device)

    def take(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """This process' positions of a tensor that holds all of them along `dim`."""
        return torch.cat([tensor.narrow(dim, start, end - start) for start, end in self.own], dim)

    def gather(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """All positions, in order, from every process' share of them along `dim`; differentiable."""
        gathered: Tensor = _Gather.apply(tensor, dim, self)
        return gathered

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> CompactMask:
        """The mask of this process' queries and all keys; arguments are those of `compact_mask`.

        Raises:
            ValueError: a cache, or a pattern that has no compact form or that this process does not
                know for the whole sequence.
        """
        if not (isinstance(q_offset, int) and q_offset == kv_offset == 0) or not (
            q_length == kv_length == self.own_length
        ):
            raise ValueError(
                f"a shared sequence takes no cache and no cross-attention: {self.own_length} of its "
                f"positions are here, but the mask is for {q_length} queries from {q_offset} on and "
                f"{kv_length} keys from {kv_offset} on; pass use_cache=False."
            )
        plain = mask_function in (causal_mask_function, bidirectional_mask_function)
        if attention_mask is None and not plain:
            # Transformers may have read packed sequences into it, off the positions of this share.
            raise ValueError(
                "a shared sequence needs attention_mask where its mask is not simply causal; pass the "
                "inputs that hf_expressive.context_parallel returns."
            )
        keys = None if attention_mask is None else self.gather(attention_mask)
        parts = []
        for start, end in self.own:
            part = compact_mask(
                batch_size=batch_size,
                q_length=end - start,
                kv_length=self.length,
                q_offset=start,
                mask_function=mask_function,
                attention_mask=keys,
                **arguments,
            )
            if not isinstance(part, CompactMask):
                raise ValueError(
                    "a shared sequence needs a mask in which each query sees one range of keys, and "
                    "this model's is of another kind."
                )
            parts.append(part)
        ranges = KeyRanges(
            torch.cat([part.start for part in parts], dim=1),
            torch.cat([part.end for part in parts], dim=1),
            parts[0].key_mask,
        )
        padded = parts[0].is_padded
        if self.packing is not None and not padded and mask_function != bidirectional_mask_function:
            packing = KeyRanges(self.take(self.packing.start), self.take(self.packing.end))
            ranges = intersect(ranges, packing)
        mask = CompactMask(ranges, batch_size, self.length, parts[0].dtype, None, is_padded=padded)
        mask.share = self
        return mask

    def exchange(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        keywords: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All keys, all values, and the mask of an attention call with this process' share of them.

        Raises:
            ValueError: a call that holds something else than a share of one sequence.
        """
        for name, reason in _REFUSED.items():
            if keywords.get(name) is not None:
                raise ValueError(
                    f"attention was called with {name}=<{type(keywords[name]).__name__}> on a shared "
                    f"sequence: {reason}."
                )
        if not query.shape[2] == key.shape[2] == self.own_length:
            raise ValueError(
                f"attention was called with {query.shape[2]} queries and {key.shape[2]} keys, but this "
                f"process holds {self.own_length} of {self.length} positions; pass the inputs that "
                "hf_expressive.context_parallel returns, without a cache and without other sequences."
            )
        if attention_mask is None and keywords.get("is_causal"):
            window = keywords.get("sliding_window")
            pattern = (
                sliding_window_causal_mask_function(window) if window else causal_mask_function
            )
            batch = (query.shape[0], query.shape[2], key.shape[2])
            everything = query.new_ones(batch[:2], dtype=torch.bool)
            attention_mask = self.mask(
                *batch, mask_function=pattern, attention_mask=everything, device=query.device
            )
        if attention_mask is not None and getattr(attention_mask, "share", None) is not self:
            raise ValueError(
                "attention was called with a mask of its own on a shared sequence; pass a padding mask "
                "(batch, length) or none."
            )
        return self.gather(key, 2), self.gather(value, 2), attention_mask


class _Gather(torch.autograd.Function):
    """All positions from the shares; backward the sum of the gradients that all processes have."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, share: SequenceShare) -> Tensor:
        ctx.dim, ctx.share, ctx.own_length = dim, share, tensor.shape[dim]
        rows = tensor.movedim(dim, 0)
        padded = rows.new_zeros(share._longest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty(share.processes * share._longest, *rows.shape[1:])
        _collective("all_gather_single", "all_gather_into_tensor")(
            gathered, padded, group=share.group
        )
        return gathered.index_select(0, share._places).movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        share: SequenceShare = ctx.share
        rows = grad.movedim(ctx.dim, 0)
        # Half precision would round every partial sum.
        wide = torch.promote_types(grad.dtype, torch.float32)
        placed = rows.new_zeros(share.processes * share._longest, *rows.shape[1:], dtype=wide)
        placed.index_copy_(0, share._places, rows.to(wide))
        summed = placed.new_empty(share._longest, *rows.shape[1:])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(
            summed, placed, group=share.group
        )
        own = summed[: ctx.own_length].to(grad.dtype)
        return own.movedim(0, ctx.dim), None, None


def _collective(name: str, until_2_12: str) -> Callable[..., Any]:
    """A collective of PyTorch, which 2.13 renamed."""
    found: Callable[..., Any] = getattr(dist, name, None) or getattr(dist, until_2_12)
    return found


# A plain variable: backward passes recompute checkpointed layers in threads of their own.
_active: SequenceShare | None = None


@contextmanager
def shared(share: SequenceShare) -> Iterator[None]:
    """Within it every attention of a mechanism is that of a shared sequence.

    Raises:
        RuntimeError: another share is active.
    """
    global _active
    if _active is not None:
        raise RuntimeError("a sequence is shared already; leave its `with` block first.")
    _active = share
    try:
        yield
    finally:
        _active = None


#: Before anything has put another function in its place.
_SOFTMAX = torch.nn.functional.scaled_dot_product_attention


def share_of(attention_mask: Tensor | None) -> SequenceShare | None:
    """The share that an attention call belongs to: that of its mask, or the active one.

    A layer that is recomputed in a later backward pass has its mask still.

    Raises:
        RuntimeError: PyTorch's own context parallelism is active, which exchanges keys in
            `scaled_dot_product_attention` only.
    """
    softmax = torch.nn.functional.scaled_dot_product_attention
    # `torch.compile` can compare functions, but not ask where they come from.
    if softmax is not _SOFTMAX and getattr(softmax, "__module__", "").startswith(
        "torch.distributed."
    ):
        raise RuntimeError(
            "the context parallelism of PyTorch and Accelerate reaches softmax attention only, and this "
            "model's attention would see a part of the sequence; use hf_expressive.context_parallel "
            "instead of ParallelismConfig(cp_size=…)."
        )
    share: SequenceShare | None = getattr(attention_mask, "share", None)
    return _active if share is None else share


@functools.wraps(compact_mask)
def mask_function(*args: Any, **kwargs: Any) -> Tensor:
    """`compact_mask`, or that of a shared sequence."""
    return compact_mask(*args, **kwargs) if _active is None else _active.mask(*args, **kwargs)
