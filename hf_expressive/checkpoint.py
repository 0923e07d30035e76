"""What a variant's `config.json` says, and what it must not lack.

A saved variant says three times that it is one: `attn_implementation` makes plain Transformers refuse
it, the section `hf_expressive` holds the options, and `architectures` names a class that only this
package knows, so that serving engines which bring an attention of their own refuse it as well.
`config.architectures` keeps that name in memory; the loaders of Transformers get the stock one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .config import CONFIG_CLASSES, SECTION, read_section, shown

#: What stands before the class in the `architectures` of a variant.
PREFIX = "HfExpressive"

_FLAG = "attn_implementation"

#: Name of a large file in the Hub's cache: what the Hub says its content hashes to.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STARTED = time.time()


def variant_names(architectures: Sequence[str]) -> list[str]:
    """The names that a variant's `config.json` has for classes of Transformers."""
    return [PREFIX + name for name in stock_names(architectures)]


def stock_names(architectures: Sequence[str]) -> list[str]:
    """The classes of Transformers behind names that may be a variant's."""
    return [name.removeprefix(PREFIX) for name in architectures]


def check_config_file(content: Mapping[str, Any]) -> None:
    """Refuses a `config.json` that describes a variant incompletely or contradicts itself.

    A file without any trace of this package passes, whatever else it holds. So does one written by hand
    that has the stock names of its classes and one of flag and section: each selects the mechanism.

    Raises:
        ValueError: flag, section or names are malformed, missing or name different mechanisms.
    """
    names = content.get("architectures")
    listed = names if isinstance(names, list) else [names]
    saved_by_us = any(isinstance(name, str) and name.startswith(PREFIX) for name in listed)
    if saved_by_us and not all(isinstance(name, str) for name in listed):
        raise ValueError(f"config.json: architectures must list names, got {shown(names)}.")
    parts = list(_parts(content))
    sections = [part[SECTION] for part in parts if SECTION in part]
    if not saved_by_us and not sections:
        return
    described = {read_section(section).mechanism for section in sections}
    for hidden in ("_attn_implementation", "_attn_implementation_internal"):
        if any(hidden in part for part in parts):
            raise ValueError(f"config.json of a variant must not set {hidden}; {_CHANGED}")
    flag = content.get(_FLAG)
    if flag is None and not saved_by_us:
        return
    asked = set(_leaves(flag)) & set(CONFIG_CLASSES)
    if not asked:
        raise ValueError(
            f"config.json describes a variant of {SECTION}, but {_FLAG} is {shown(flag)}, none of "
            f"{', '.join(sorted(CONFIG_CLASSES))}; {_CHANGED}"
        )
    if missing := asked - described:
        raise ValueError(
            f"config.json: {_FLAG} asks for {', '.join(sorted(missing))}, but no section {SECTION} "
            f"describes it; {_CHANGED}"
        )


_CHANGED = "the file was changed after it was saved. Get the original again."


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and every mapping in it, sections apart."""
    pending = [content]
    while pending:
        part = pending.pop()
        yield part
        pending += [
            value for key, value in part.items() if key != SECTION and isinstance(value, Mapping)
        ]


def _leaves(flag: object) -> Iterator[str]:
    """The names in a flag: one, or those of the parts of a composite model."""
    pending = [flag]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, str):
            yield value
        elif value is not None:
            raise ValueError(
                f"config.json: {_FLAG} must be a name, or names by part, got {shown(flag)}."
            )


def check_weight_files(files: Sequence[str | Path], *, whole_cache: bool = False) -> None:
    """Refuses weights of a variant that are pickled, incomplete, or not what the Hub says they are.

    The Hub's client compares sizes, not contents. A file that this process has downloaded is hashed
    once; a wrong one is removed from the cache, so that the next load fetches it again. Checkpoints
    without any trace of this package pass.

    Args:
        files: what is about to be loaded, all of one checkpoint.
        whole_cache: hash files that an earlier process has downloaded as well.

    Raises:
        ValueError: a file is not safetensors; nothing of it has been read.
        OSError: a file's length is not what its header says, or its content not what the Hub told.
    """
    paths = [Path(file) for file in files]
    if not paths or not is_variant(paths[0].parent):
        return
    for path in paths:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path.name} is not safetensors: a variant of {SECTION} has no pickled weights, which "
                "could run code when they are read. Save it again with save_pretrained."
            )
        _check_header(path)
    wrong = []
    for path in paths:
        blob = path.resolve()
        if not _SHA256.fullmatch(blob.name):
            continue
        if not whole_cache and blob.stat().st_mtime < _STARTED:
            continue
        with blob.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != blob.name:
            wrong.append(f"the SHA-256 of {path.name} is {found}, the Hub says {blob.name}")
            path.unlink()
            blob.unlink()
    if wrong:
        raise OSError(
            f"damaged or changed on the way from the Hub: {'; '.join(wrong)}. It has been removed from "
            "the cache; load the model again."
        )


def _check_header(path: Path) -> None:
    """The header of a safetensors file says how long it has to be, and what lies where."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path.name} is incomplete or damaged: {error}. Get it again.") from error


def is_variant(folder: Path) -> bool:
    """Whether the `config.json` in a folder describes a variant."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, Mapping) and any(SECTION in part for part in _parts(content))
