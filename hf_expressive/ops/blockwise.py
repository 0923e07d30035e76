"""The family in tiles of queries and keys: plain torch operations, O(N) memory in both directions.

Numerators and denominators of disjoint key ranges add, so a row of weights never exists as a whole;
the backward pass recomputes the weights of a block instead of storing them. Used on CPU by `auto`;
correct on every device.

A block is a slice of the batch, a slice of the key/value heads, a tile of queries (for all heads of
a group, so that keys are not repeated) and a tile of keys. Its scores are (b, K', group · q, n).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .dropout import keep_mask
from .layout import empty_rows
from .problem import HIDDEN, AttentionProblem

#: Scores of a block for each thread, at least a tile by a tile: 2¹⁷ float32 values, a quarter to a half
#: of a core's level-2 cache. PyTorch deals every operation on a block out to all threads.
_BLOCK_SCORES = 2**17
_TILE = 256


@dataclass(frozen=True, slots=True)
class _Block:
    """Where a block lies: slices of batch, key/value heads, queries and keys."""

    batch: slice
    heads: slice
    rows: slice
    columns: slice
    #: Whether some key of the block is hidden from some query by ranges, causality or a window.
    partial: bool


@dataclass(frozen=True, slots=True)
class _Band:
    """A tile of queries: the key tiles it sees, each with whether it sees them whole."""

    rows: slice
    columns: list[tuple[slice, bool]]


class _Tiling:
    """A problem in compute dtype, grouped heads apart, and the blocks it is cut into."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        self.dtype = dtype = problem.compute_dtype
        self.device = problem.query.device
        self.batch, _, self.num_queries, self.head_dim = problem.query.shape
        _, self.kv_heads, self.num_keys, self.value_dim = problem.value.shape
        self.group = problem.group

        # The factor rides on the query: a pass over Q·D numbers instead of Q·N.
        self.factor = torch.full((), problem.scale, dtype=dtype, device=self.device)
        if problem.gain is not None:
            gain = problem.gain.to(dtype).view(1, self.kv_heads, self.group, 1, 1)
            self.factor = self.factor * gain
        self.query = self.split_heads(problem.query.to(dtype)) * self.factor
        self.key = problem.key.to(dtype).contiguous()
        self.value = problem.value.to(dtype).contiguous()

        self.key_bias = None if problem.key_bias is None else problem.key_bias.to(dtype)
        self.bias = None if problem.bias is None else self.split_heads(problem.bias)
        self.mask = None if problem.mask is None else self.split_heads(problem.mask)
        self.sinks: Tensor | None = None
        if problem.sinks is not None:
            full = (self.batch, problem.query.shape[1], self.num_queries)
            sinks = problem.sinks.to(dtype).expand(full)[..., None]
            self.sinks = self.split_heads(sinks)
        #: With an additive log-weight (or the exponential response) a row needs a running shift.
        self.shifted = (
            self.key_bias is not None
            or self.bias is not None
            or self.sinks is not None
            or not problem.response.bounded
        )
        self.clamped = self._may_overflow()

        index = torch.arange(self.num_queries, device=self.device)
        start, end = problem.static_bounds(index)
        self.start, self.end, self.keys = start[None], end[None], None
        if problem.ranges is not None:
            self.start = torch.maximum(self.start, problem.ranges.start)
            self.end = torch.minimum(self.end, problem.ranges.end)
            self.keys = problem.ranges.keys

    def split_heads(self, tensor: Tensor) -> Tensor:
        """(B, H, …) → (B, K, group, …); a head dimension of 1 stays 1."""
        if tensor.shape[1] == 1:
            return tensor[:, :, None]
        return tensor.unflatten(1, (self.kv_heads, self.group))

    def _may_overflow(self) -> bool:
        """Whether a Hill response might need its scores clamped (one look at the largest entries)."""
        response = self.problem.response
        if response.kind != "hill" or not self.query.numel() or not self.key.numel():
            return False
        largest = [torch.stack(tensor.aminmax()).abs().amax() for tensor in (self.query, self.key)]
        return not bool(largest[0] * largest[1] * self.head_dim < response.limit(self.dtype))

    def bands(self, batch: slice) -> list[_Band]:
        """The tiles of queries, each with the key tiles that are not hidden as a whole."""
        tile = max(_TILE // self.group, 16)
        pick = batch if self.start.shape[0] > 1 else slice(None)
        bands = []
        whole = [True] * -(-self.num_keys // _TILE)
        if self.keys is not None:
            keys = self.keys[batch if self.keys.shape[0] > 1 else slice(None)]
            whole = [bool(part.all()) for part in keys.split(_TILE, dim=1)]
        for first in range(0, self.num_queries, tile):
            rows = slice(first, min(first + tile, self.num_queries))
            start, end = self.start[pick, rows], self.end[pick, rows]
            bounds = torch.stack([start.min(), end.max(), start.max(), end.min()])
            lowest, highest, inner_start, inner_end = bounds.tolist()
            columns = []
            for left in range(lowest // _TILE * _TILE, highest, _TILE):
                right = min(left + _TILE, self.num_keys)
                partial = left < inner_start or right > inner_end or not whole[left // _TILE]
                columns.append((slice(left, right), partial))
            bands.append(_Band(rows, columns))
        return bands

    def __iter__(self) -> Iterator[tuple[slice, slice, _Band]]:
        """(batch slice, key/value head slice, band): as many pairs at once as fit a block."""
        tile_scores = min(self.num_queries * self.group, _TILE) * min(self.num_keys, _TILE)
        pairs = max(_BLOCK_SCORES * torch.get_num_threads() // max(tile_scores, 1), 1)
        heads_step = min(pairs, self.kv_heads)
        batch_step = max(pairs // self.kv_heads, 1)
        for first in range(0, self.batch, batch_step):
            batch = slice(first, min(first + batch_step, self.batch))
            bands = self.bands(batch)
            for head in range(0, self.kv_heads, heads_step):
                heads = slice(head, min(head + heads_step, self.kv_heads))
                for band in bands:
                    yield batch, heads, band

    def rows_of(self, tensor: Tensor, batch: slice, heads: slice, rows: slice) -> Tensor:
        """(B, K, group, Q, X) → (b, K', group · q, X) of one band."""
        return tensor[batch, heads, :, rows].flatten(2, 3)

    def scores(self, query: Tensor, block: _Block) -> tuple[Tensor, Tensor | None]:
        """Scores of a block and, with a softcap, the slope of the cap."""
        key = self.key[block.batch, block.heads, block.columns]
        score = torch.matmul(query, key.transpose(-1, -2))
        cap_slope = None
        if self.problem.softcap is not None:
            ratio = score.div_(self.problem.softcap).tanh_()
            cap_slope = 1.0 - ratio.square()
            score = ratio * self.problem.softcap
        if self.clamped:
            limit = self.problem.response.limit(self.dtype)
            score = score.clamp(-limit, limit)
        return score, cap_slope

    def additive(self, block: _Block, score: Tensor) -> Tensor:
        """Additive log-weight of a block with −inf where a key is hidden, (b, K', group, q, n)."""
        shape = self.blocked(score, block)
        exponential = not self.problem.response.bounded
        total = shape.clone() if exponential else torch.zeros_like(shape)
        if self.key_bias is not None:
            total += self.key_bias[block.batch, block.heads, None, None, block.columns]
        if self.bias is not None:
            bias = self.cut(self.bias, block)
            total += bias
            total.masked_fill_(bias <= HIDDEN, -torch.inf)
        hidden = self.hidden(block)
        return total if hidden is None else total.masked_fill_(hidden, -torch.inf)

    def blocked(self, score: Tensor, block: _Block) -> Tensor:
        """(b, K', group · q, n) → (b, K', group, q, n), a view."""
        return score.unflatten(2, (self.group, block.rows.stop - block.rows.start))

    def cut(self, tensor: Tensor, block: _Block) -> Tensor:
        """The part of a (B|1, K|1, group|1, Q|1, N|1) tensor that belongs to a block."""
        where = (block.batch, block.heads, slice(None), block.rows, block.columns)
        pick = [
            cut if size > 1 else slice(None) for cut, size in zip(where, tensor.shape, strict=True)
        ]
        return tensor[tuple(pick)]

    def hidden(self, block: _Block) -> Tensor | None:
        """True where a key is hidden, broadcastable to (b, K', group, q, n); `None`: nowhere."""
        hidden = None
        if block.partial:
            pick = block.batch if self.start.shape[0] > 1 else slice(None)
            start = self.start[pick, None, None, block.rows, None]
            end = self.end[pick, None, None, block.rows, None]
            index = torch.arange(block.columns.start, block.columns.stop, device=self.device)
            hidden = (index < start) | (index >= end)
            if self.keys is not None:
                pick = block.batch if self.keys.shape[0] > 1 else slice(None)
                hidden = hidden | ~self.keys[pick, None, None, None, block.columns]
        if self.mask is not None:
            unseen = ~self.cut(self.mask, block)
            hidden = unseen if hidden is None else hidden | unseen
        return hidden

    def kept(self, block: _Block) -> Tensor | None:
        """Dropout factor 0 or 1/(1 − p), broadcastable to (b, K', group, q, n); `None` without."""
        dropout, seed = self.problem.dropout, self.problem.seed
        if dropout == 0.0:
            return None
        assert seed is not None
        index = torch.arange(self.batch * self.kv_heads * self.group, device=self.device)
        head = index.view(self.batch, self.kv_heads, self.group, 1, 1)[block.batch, block.heads]
        row = torch.arange(block.rows.start, block.rows.stop, device=self.device)[:, None]
        column = torch.arange(block.columns.start, block.columns.stop, device=self.device)
        keep = keep_mask(seed, head, row, column, dropout)
        return keep.to(self.dtype) / (1.0 - dropout)


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Evaluates a problem.

    Returns:
        out: (B, H, Q, E), dtype and order in memory those of the query.
        log_normalizer: log(exp(sink) + Σ w), (B, H, Q) in the compute dtype, −inf for rows that see
            nothing.
    """
    tiling = _Tiling(problem)
    shape = (tiling.batch, tiling.kv_heads, tiling.group, tiling.num_queries)
    out = empty_rows(problem.query, tiling.value_dim, dtype=tiling.dtype)
    grouped = tiling.split_heads(out)
    log_normalizer = torch.empty(shape, dtype=tiling.dtype, device=tiling.device)
    tiny = torch.finfo(tiling.dtype).tiny

    for batch, heads, band in tiling:
        query = tiling.rows_of(tiling.query, batch, heads, band.rows)
        total = query.new_zeros(*query.shape[:3], tiling.value_dim)
        normalizer = query.new_zeros(*query.shape[:3], 1)
        shift = query.new_full((*query.shape[:3], 1), -torch.inf)
        if tiling.sinks is not None:
            shift = tiling.rows_of(tiling.sinks, batch, heads, band.rows).clone()
            normalizer += shift.isfinite()
        for columns, partial in band.columns:
            block = _Block(batch, heads, band.rows, columns, partial)
            score, _ = tiling.scores(query, block)
            if tiling.shifted:
                additive = tiling.additive(block, score).flatten(2, 3)
                highest = torch.maximum(shift, additive.amax(dim=-1, keepdim=True))
                safe = torch.where(highest.isfinite(), highest, 0.0)
                weight = additive.sub_(safe).exp_()
                if problem.response.bounded:
                    weight = weight.mul_(problem.response(score))
                rescale = torch.exp(shift - safe)
                total, normalizer = total * rescale, normalizer * rescale
                shift = highest
            else:
                weight = _hill_1_(score) if _is_hill_1(problem) else problem.response(score)
                hidden = tiling.hidden(block)
                if hidden is not None:
                    tiling.blocked(weight, block).masked_fill_(hidden, 0.0)
            normalizer += weight.sum(dim=-1, keepdim=True)
            kept = tiling.kept(block)
            if kept is not None:
                tiling.blocked(weight, block).mul_(kept)
            total += torch.matmul(weight, tiling.value[batch, heads, columns])
        empty = normalizer < tiny
        result = (total / normalizer).masked_fill_(empty, 0.0)
        logarithm = torch.log(normalizer)
        if tiling.shifted:
            logarithm = logarithm + shift
        logarithm = logarithm.masked_fill_(empty, -torch.inf)
        rows = band.rows.stop - band.rows.start
        where = (batch, heads, slice(None), band.rows)
        grouped[where] = result.unflatten(2, (tiling.group, rows))
        log_normalizer[where] = logarithm.squeeze(-1).unflatten(2, (tiling.group, rows))

    return out.to(problem.query.dtype), log_normalizer.flatten(1, 2)


def backward(
    problem: AttentionProblem,
    out: Tensor,
    log_normalizer: Tensor,
    grad_out: Tensor,
    *,
    need_key_bias: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `forward` with respect to query, key, value, key_bias and bias.

    With P the normalised weights, dP_ij = grad_out_i·v_j and δ_i = grad_out_i·out_i, the additive
    log-weight receives P (dP − δ) and the score (dP − δ) · exp(additive − log_normalizer) · dg/dz.
    """
    tiling = _Tiling(problem)
    grad = tiling.split_heads(grad_out.to(tiling.dtype))
    delta = (grad * tiling.split_heads(out.to(tiling.dtype))).sum(dim=-1, keepdim=True)
    log_norm = tiling.split_heads(log_normalizer.to(tiling.dtype))[..., None]
    empty = log_norm.isneginf()
    # Rows that see nothing must not pass a gradient on.
    grad = grad.masked_fill(empty, 0.0)
    log_norm = log_norm.masked_fill(empty, 0.0)
    if not tiling.shifted:
        inverse = torch.exp(-log_norm)
        grad, delta = grad * inverse, delta * inverse

    grad_query = torch.zeros_like(tiling.query)
    grad_key = torch.zeros_like(tiling.key)
    grad_value = torch.zeros_like(tiling.value)
    grad_key_bias = grad_bias = None
    if need_key_bias:
        assert tiling.key_bias is not None
        grad_key_bias = torch.zeros_like(tiling.key_bias)
    if need_bias:
        assert tiling.bias is not None
        grad_bias = torch.zeros_like(tiling.bias, dtype=tiling.dtype)

    for batch, heads, band in tiling:
        query = tiling.rows_of(tiling.query, batch, heads, band.rows)
        band_grad = tiling.rows_of(grad, batch, heads, band.rows)
        band_delta = tiling.rows_of(delta, batch, heads, band.rows)
        band_norm = tiling.rows_of(log_norm, batch, heads, band.rows)
        band_grad_query = torch.zeros_like(query)
        for columns, partial in band.columns:
            block = _Block(batch, heads, band.rows, columns, partial)
            score, cap_slope = tiling.scores(query, block)
            if tiling.shifted:
                additive = tiling.additive(block, score).flatten(2, 3)
                weight = additive.sub_(band_norm).exp_()
                slope = weight
                if problem.response.bounded:
                    slope = weight * problem.response.slope(score)
                    weight = weight * problem.response(score)
            else:
                weight, slope = (
                    _hill_1_with_slope(score)
                    if _is_hill_1(problem)
                    else (problem.response(score), problem.response.slope(score))
                )
                hidden = tiling.hidden(block)
                if hidden is not None:
                    tiling.blocked(weight, block).masked_fill_(hidden, 0.0)
                    tiling.blocked(slope, block).masked_fill_(hidden, 0.0)
            value = tiling.value[batch, heads, columns]
            grad_weight = torch.matmul(band_grad, value.transpose(-1, -2))
            dropped, kept = weight, tiling.kept(block)
            if kept is not None:
                tiling.blocked(grad_weight, block).mul_(kept)
                dropped = (tiling.blocked(weight, block) * kept).flatten(2, 3)
            grad_weight -= band_delta
            grad_value[batch, heads, columns] += torch.matmul(dropped.transpose(-1, -2), band_grad)
            if grad_key_bias is not None or grad_bias is not None:
                grad_additive = tiling.blocked(weight * grad_weight, block)
                if grad_key_bias is not None:
                    grad_key_bias[batch, heads, columns] += grad_additive.sum(dim=(2, 3))
                if grad_bias is not None:
                    part = tiling.cut(grad_bias, block)
                    part += grad_additive.sum_to_size(part.shape)
            grad_score = grad_weight.mul_(slope)
            if cap_slope is not None:
                grad_score.mul_(cap_slope)
            key = tiling.key[batch, heads, columns]
            band_grad_query += torch.matmul(grad_score, key)
            grad_key[batch, heads, columns] += torch.matmul(grad_score.transpose(-1, -2), query)
        rows = (tiling.group, band.rows.stop - band.rows.start)
        grad_query[batch, heads, :, band.rows] = band_grad_query.unflatten(2, rows)

    dtype = problem.query.dtype
    return (
        (grad_query * tiling.factor).flatten(1, 2).to(dtype),
        grad_key.to(dtype),
        grad_value.to(dtype),
        grad_key_bias,
        None if grad_bias is None else grad_bias.view(problem.bias.shape).to(problem.bias.dtype),  # type: ignore[union-attr]
    )


def _is_hill_1(problem: AttentionProblem) -> bool:
    return problem.response.kind == "hill" and problem.response.power == 1.0


def _hill_1_(score: Tensor) -> Tensor:
    """z² / (1 + z²) in three passes, the score overwritten."""
    squared = score.square_()
    return squared.div_(1.0 + squared)


def _hill_1_with_slope(score: Tensor) -> tuple[Tensor, Tensor]:
    """z² / (1 + z²) and 2z / (1 + z²)², in five passes."""
    rest = torch.addcmul(score.new_ones(()), score, score)
    ratio = score / rest
    return score.mul_(ratio), ratio.div_(rest).mul_(2.0)
