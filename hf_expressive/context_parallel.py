"""Sequences longer than one device holds: a batch shared by the processes of a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention.sequence_share import SequenceShare, shared
from .discovery import attention_modules, foreign_modules
from .masking import packed_rows
from .patcher import implementation
from .registry import MECHANISMS

_IGNORED = -100
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv", "ssm")


@contextmanager
def context_parallel(
    model: nn.Module, batch: Mapping[str, Any], group: dist.ProcessGroup | None = None
) -> Iterator[dict[str, Any]]:
    """Shares the positions of a batch among processes; within the `with` block attention is exact.

        with hf_expressive.context_parallel(model, batch, group) as share:
            loss = model(**share).loss
            loss.backward()

    Every process passes the same whole batch and gets its own part of it. With the gradients averaged
    over the group, as DDP and FSDP2 do, losses and gradients have the values of one process with the
    whole batch. Keys and values are exchanged in every attention layer (see `sequence_share`); all
    else in the model must treat each position by itself.

    Random numbers are each process' own: seed the processes alike where noise belongs to the whole
    sequence (frequencies of the implicit kernels, dropped magnitudes), which is what
    `accelerate.utils.set_seed` does by default.

    Args:
        model: a model, or a wrapper around one, whose attention all runs a mechanism of this package.
            Softmax layers and heads of a hybrid are shared too.
        batch: `input_ids` or `inputs_embeds`, (batch, length, …), and what else the model takes.
            Tensors (batch or 1, length, …) are cut; `attention_mask` may be (batch, length) only.
            `labels` are those of a causal language model. Everything else passes as it is.
        group: processes; all of them by default.

    Yields:
        The arguments of this process' forward pass: the cut tensors; `attention_mask` and, from 0 on,
        `position_ids` where the batch had none; with labels `shift_labels`, each position's next
        label, and `num_items_in_batch`, their number a process, by which the loss is divided.

    Raises:
        ValueError: a model with attention or recurrence that would see its own part of the sequence
            only, a sequence too short for the group, a mask with other than two dimensions, no
            `position_ids` where models count them in different ways.
        RuntimeError: no process group has been initialised, or a sequence is shared already.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "context_parallel needs processes; start with torchrun or accelerate launch, and call "
            "torch.distributed.init_process_group() or make an Accelerator."
        )
    _refuse(model)
    group = dist.group.WORLD if group is None else group
    assert group is not None
    main = batch.get("input_ids")
    main = batch.get("inputs_embeds") if main is None else main
    if not isinstance(main, Tensor) or main.dim() < 2:
        raise ValueError("batch needs input_ids (batch, length) or inputs_embeds, as tensors.")
    rows, length = main.shape[:2]
    if length < 2 * group.size():
        raise ValueError(
            f"{length} positions are too few for {group.size()} processes; each takes two at least."
        )
    whole = dict(batch)
    mask = whole.setdefault("attention_mask", main.new_ones((rows, length), dtype=torch.bool))
    if not isinstance(mask, Tensor) or mask.shape != (rows, length):
        raise ValueError(
            f"attention_mask must be a padding mask {(rows, length)}, got "
            f"{tuple(mask.shape) if isinstance(mask, Tensor) else mask!r}."
        )
    padded = not bool(mask.all())
    if whole.get("position_ids") is None:
        _refuse_to_count(model, padded)
        whole["position_ids"] = torch.arange(length, device=main.device)[None]
    positions = whole["position_ids"]
    packing = packed_rows(positions) if positions.dim() == 2 and not padded else None
    if (labels := whole.get("labels")) is not None:
        _count_labels(whole, labels, group.size())

    share = SequenceShare(group, length, main.device, packing)
    cut = {
        name: share.take(value) if _has_positions(value, rows, length) else value
        for name, value in whole.items()
    }
    with shared(share):
        yield cut


def _has_positions(value: object, rows: int, length: int) -> bool:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    return value.shape[0] in (1, rows) and value.shape[1] == length


def _refuse_to_count(model: nn.Module, padded: bool) -> None:
    """Raises ValueError where a model may count positions in another way than from 0 on."""
    from_padding = any(
        isinstance(module, nn.Embedding)
        and module.padding_idx is not None
        and "position" in name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
    )
    if padded or from_padding:
        reason = "it has padding" if padded else "this model counts from its padding index on"
        raise ValueError(
            f"batch needs position_ids (batch, length), because {reason}; give those that the model "
            "would count on the whole sequence."
        )


def _count_labels(batch: dict[str, Any], labels: Tensor, processes: int) -> None:
    """Adds next-token labels, shifted before the cut, and the number that the loss is divided by."""
    if "shift_labels" not in batch:
        batch["shift_labels"] = nn.functional.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
    counted = batch.get("num_items_in_batch")
    counted = (batch["shift_labels"] != _IGNORED).sum() if counted is None else counted
    # The mean over processes of (own sum · processes / all) is the mean over the sequence.
    batch["num_items_in_batch"] = counted / processes


def _refuse(model: nn.Module) -> None:
    """Raises ValueError for a model some part of which would stay within its share."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not parts:
        raise ValueError(f"{type(model).__name__} holds no Transformers model.")
    for found in [*attention_modules(parts[0]), *foreign_modules(parts[0])]:
        if implementation(found.owner) not in MECHANISMS:
            raise ValueError(
                f"{found.name or type(found.module).__name__} runs "
                f"attn_implementation={implementation(found.owner)!r}, which would see its own part of "
                "the sequence only; every attention of the model must run a mechanism of hf_expressive "
                '(kernel="rbf" of "implicit_kernel" is softmax attention).'
            )
    config = parts[0].config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = sorted(kind for kind in kinds if any(word in kind for word in _RECURRENT))
    if recurrent:
        raise ValueError(
            f"{type(parts[0]).__name__} has layers of type {', '.join(recurrent)}, which carry a state "
            "along the sequence and would start anew in every process."
        )
