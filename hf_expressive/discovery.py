"""Which modules of a model are attention modules, read off their code, never off a list of names.

A module *asks the registry* if its `forward` looks `ALL_ATTENTION_FUNCTIONS` up. A module is *foreign*
if it is called attention, computes a softmax and a product itself and does not ask the registry: a
mechanism could not reach it. (A softmax without a product is no comparison of queries with keys;
deformable attention normalises learned sampling weights that way.)
"""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_WHOLE_ATTENTION = {"scaled_dot_product_attention", "eager_attention_forward"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "@"}


@cache
def _looks_up(cls: Any) -> bool:
    names = _names(cls, "forward")
    # getattr() on the registry never finds a registered function: such code always runs its own.
    looks_up = "get_interface" in names or "getattr" not in names
    return _REGISTRY in names and looks_up


@cache
def _has_own_softmax(cls: Any) -> bool:
    if asks_registry(cls) or not re.search(r"Attention|Attn", cls.__name__):
        return False
    names = set().union(*(_names(cls, name) for name, _ in inspect.getmembers(cls, callable)))
    by_hand = "softmax" in names and not names.isdisjoint(_PRODUCTS)
    return by_hand or not names.isdisjoint(_WHOLE_ATTENTION)


def asks_registry(cls: type[nn.Module]) -> bool:
    """Whether the forward of a module class looks its attention function up in the registry."""
    key: Any = cls  # hashable, though the metaclass' stubs deny it
    return _looks_up(key)


def computes_own_attention(cls: type[nn.Module]) -> bool:
    """Whether a module class is attention by name and computes its softmax without the registry."""
    key: Any = cls
    return _has_own_softmax(key)


def _names(cls: type[nn.Module], method: str) -> set[str]:
    """Names in the code of a method (and `@` where it is used), decorators removed."""
    function = inspect.unwrap(getattr(cls, method))
    defined_by_torch = (getattr(function, "__module__", None) or "").startswith("torch.")
    code = getattr(function, "__code__", None)
    if defined_by_torch or not isinstance(code, CodeType):
        return set()
    found: set[str] = set()
    pending = [code]
    while pending:
        current = pending.pop()
        found.update(current.co_names, current.co_freevars)
        found.update(step.argrepr for step in dis.get_instructions(current) if step.argrepr == "@")
        pending.extend(const for const in current.co_consts if isinstance(const, CodeType))
    return found


@dataclass(frozen=True)
class AttentionModule:
    """One attention module of a model.

    Attributes:
        name: path within the model.
        module: the module.
        owner: the innermost `PreTrainedModel` that contains it; its config selects the mechanism.
        layer: index of its layer within the owner, in order.
    """

    name: str
    module: nn.Module
    owner: PreTrainedModel
    layer: int


def attention_modules(model: PreTrainedModel) -> list[AttentionModule]:
    """The modules of a model that ask the registry, in order."""
    found = []
    layers: dict[int, dict[str, int]] = {}
    for name, module, owner, layer_name in _walk(model):
        if asks_registry(type(module)):
            # Self- and cross-attention of one layer share the layer's name.
            seen = layers.setdefault(id(owner), {})
            layer = seen.setdefault(layer_name or name, len(seen))
            found.append(AttentionModule(name, module, owner, layer))
    return found


def foreign_modules(model: PreTrainedModel) -> list[AttentionModule]:
    """The modules of a model that compute a softmax attention of their own."""
    return [
        AttentionModule(name, module, owner, 0)
        for name, module, owner, _ in _walk(model)
        if computes_own_attention(type(module))
        and not any(asks_registry(type(child)) for child in module.modules())
    ]


def _walk(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel, str]]:
    """(path, module, innermost PreTrainedModel, layer) of every module once, parents first.

    The layer is the path of the innermost entry of a list of layers within that PreTrainedModel, empty
    outside of such lists. A list within a layer that mixes classes holds the layer's parts, not layers.
    """
    seen: set[int] = set()

    def visit(
        module: nn.Module, name: str, owner: PreTrainedModel, layer: str
    ) -> Iterator[tuple[str, nn.Module, PreTrainedModel, str]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, PreTrainedModel):
            owner, layer = module, ""
        yield name, module, owner, layer
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        counts = is_list and (not layer or len({type(child) for child in module.children()}) == 1)
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            yield from visit(child, path, owner, path if counts else layer)

    yield from visit(model, "", model, "")


_HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "attention_heads",
    "nheads",
)
_HEAD_DIMS = ("head_dim", "qk_head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")


def num_heads(module: nn.Module) -> int | None:
    """Query heads of an attention module: its own attribute, else its config's; `None` if unknown."""
    return _first_integer(module, _HEAD_COUNTS)


def num_key_value_heads(module: nn.Module) -> int | None:
    """Key/value heads of an attention module, `None` if unknown; its query heads without grouping."""
    if (value := _first_integer(module, ("num_key_value_heads",))) is not None:
        return value
    heads, group = num_heads(module), getattr(module, "num_key_value_groups", 1)
    return heads // group if heads is not None and isinstance(group, int) else None


def head_dim(module: nn.Module) -> int | None:
    """Size of a head's queries and keys, `None` if unknown."""
    return _first_integer(module, _HEAD_DIMS)


def _first_integer(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is an integer, of the module and then of its config."""
    for source in (module, getattr(module, "config", None)):
        for name in names:
            try:
                value = getattr(source, name, None)
            except RuntimeError:
                # A heterogeneous config cannot tell what differs between its layers.
                continue
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def supported_architectures() -> tuple[str, ...]:
    """Model types of the installed Transformers whose attention asks the registry.

    Read off the source of every modeling file; nothing is imported. Parts of a composite
    architecture may still compute an attention of their own, which is refused when it is asked for.
    """
    folder = Path(inspect.getfile(transformers)).parent / "models"
    types = set()
    for path in folder.glob("*/modeling_*.py"):
        if f"{_REGISTRY}.get_interface(" in path.read_text(encoding="utf-8"):
            types.add(path.stem.removeprefix("modeling_"))
    return tuple(sorted(types))
