"""How a variant is written: into a folder in one step as far as renames go, and onto the Hub."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from . import hub
from .patcher import configs_of
from .registry import MECHANISMS

_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?")


def save_pretrained(
    original: Callable[..., None],
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Writes a variant into a folder within the target, then renames its files into place.

    Weights become current by one rename, of the only file or of the index; the config follows and
    stale weights go last. Whenever it is interrupted, the target holds weights of one checkpoint.
    """
    target = Path(save_directory)
    if not _is_variant(model) or target.is_file() or kwargs.get("distributed_checkpoint"):
        original(model, save_directory, *args, **kwargs)
        return
    if kwargs.pop("push_to_hub", False):
        _save_and_push(original, model, target, *args, **kwargs)
        return
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        original(model, staging, *args, **kwargs)
        _rename_shards(staging, {path.name for path in target.iterdir()})
        written = sorted(staging.iterdir(), key=lambda path: _order(path.name))
        stale = {path.name for path in target.iterdir() if _WEIGHTS.fullmatch(path.name)}
        for path in written:
            os.replace(path, target / path.name)
        names = {path.name for path in written}
        if any(_WEIGHTS.fullmatch(name) for name in names):
            for name in stale - names:
                (target / name).unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_and_push(
    original: Callable[..., None],
    model: PreTrainedModel,
    target: Path,
    *args: Any,
    **kwargs: Any,
) -> None:
    """`save_pretrained(…, push_to_hub=True)`: the same files into the folder and onto the Hub."""
    names = ("repo_id", "commit_message", "create_pr", "private")
    commit = {name: kwargs.pop(name) for name in names if name in kwargs}
    repo_id = commit.pop("repo_id", target.name)
    save = functools.partial(save_pretrained, original, model)
    save(target, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        model.push_to_hub(
            repo_id,
            token=kwargs.get("token"),
            save=lambda folder: save(folder, *args, **kwargs),
            **commit,
        )


def push_to_hub(original: Callable[..., Any], model: PreTrainedModel, *args: Any, **kw: Any) -> Any:
    """Publishes a variant with a model card; other models as Transformers does."""
    if not _is_variant(model):
        return original(model, *args, **kw)
    return hub.push_to_hub(model, *args, **kw)


def _rename_shards(folder: Path, taken: set[str]) -> None:
    """Gives new shards names of their own where the old checkpoint has shards of the same names.

    Otherwise an interruption between two renames would leave a mixture of both under one index.
    """
    for index in folder.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = set(content["weight_map"].values())
        if not shards & taken:
            continue
        mark = secrets.token_hex(4)
        names = {shard: shard.replace("-", f"-{mark}-", 1) for shard in shards}
        content["weight_map"] = {key: names[shard] for key, shard in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for shard, name in names.items():
            (folder / shard).rename(folder / name)


def _order(name: str) -> tuple[int, str]:
    """Shards before their index before the config."""
    weights = _WEIGHTS.fullmatch(name)
    return (0 if name.endswith(".safetensors") else 1 if weights else 2), name


def _is_variant(model: PreTrainedModel) -> bool:
    """Whether a model or a part of it runs a mechanism."""
    return any(part._attn_implementation in MECHANISMS for part in configs_of(model.config))
