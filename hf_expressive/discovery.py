"""Which modules of a model are attention modules, read off their code, never off a list of names.

A module *asks the registry* if its `forward` looks `ALL_ATTENTION_FUNCTIONS` up. A module is *foreign*
if it compares queries with keys and normalises by a softmax of its own without asking: a mechanism
could not reach it. It is called attention and computes a softmax and a product, or it is torch's
`MultiheadAttention`. (A softmax without a product compares nothing; deformable attention normalises
learned sampling weights that way.)

A foreign module that *pools*, that is weighs its inputs by one learned query or by a linear score,
compares no token with another. No choice of an attention implementation is meant for it (SigLIP's
and AIMv2's heads, residuals over depth): it stays what it is, and `explain` lists it.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections import Counter
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
#: Instructions that name a global, a free variable, an attribute or a method.
_NAMING = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_ATTR", "LOAD_METHOD"}
#: The word for a query in the name of a projection: q_proj, query, qkv, linear_q, query_key_value, …
_QUERY = re.compile(r"(^|_)w?(q|qkv|query|queries)(_|$)", re.IGNORECASE)


@cache
def _looks_up(cls: Any) -> bool:
    names = _names(cls, "forward")
    # getattr() on the registry never finds a registered function: such code always runs its own.
    looks_up = "get_interface" in names or "getattr" not in names
    return _REGISTRY in names and looks_up


@cache
def _names_of_class(cls: Any) -> Counter[str]:
    return sum((_names(cls, name) for name, _ in inspect.getmembers(cls, callable)), Counter())


def asks_registry(cls: type[nn.Module]) -> bool:
    """Whether the forward of a module class looks its attention function up in the registry."""
    key: Any = cls  # hashable, though the metaclass' stubs deny it
    return _looks_up(key)


def computes_own_attention(cls: type[nn.Module]) -> bool:
    """Whether a module class is attention by name and computes its softmax without the registry."""
    if issubclass(cls, nn.MultiheadAttention):
        return True
    if asks_registry(cls) or not re.search(r"Attention|Attn", cls.__name__):
        return False
    key: Any = cls
    names = _names_of_class(key)
    by_hand = "softmax" in names and not _PRODUCTS.isdisjoint(names)
    return by_hand or not _WHOLE_ATTENTION.isdisjoint(names)


def _pools(module: nn.Module, parent: nn.Module) -> bool:
    """Whether a module with a softmax of its own weighs its inputs by a learned query or score."""
    if isinstance(module, nn.MultiheadAttention):
        return bool(parent._parameters)
    if any(_QUERY.search(name) for name, _ in module.named_children()):
        return False
    key: Any = type(module)
    names = _names_of_class(key)
    if not _WHOLE_ATTENTION.isdisjoint(names):
        return bool(module._parameters)
    # The only product applies the weights: the scores come from elsewhere.
    return sum(names[product] for product in _PRODUCTS) == 1


def _names(cls: type[nn.Module], method: str) -> Counter[str]:
    """Names in the code of a method (and `@`) with the number of uses, decorators removed."""
    function = inspect.unwrap(getattr(cls, method))
    defined_by_torch = (getattr(function, "__module__", None) or "").startswith("torch.")
    code = getattr(function, "__code__", None)
    if defined_by_torch or not isinstance(code, CodeType):
        return Counter()
    found: Counter[str] = Counter()
    pending = [code]
    while pending:
        current = pending.pop()
        for step in dis.get_instructions(current):
            if step.argrepr == "@":
                found["@"] += 1
            elif step.opname in _NAMING:
                found[step.argval] += 1
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
    """The modules of a model that compare queries with keys by a softmax of their own."""
    return [found for found, pools in _own_softmax(model) if not pools]


def pooling_modules(model: PreTrainedModel) -> list[AttentionModule]:
    """The modules of a model that weigh their inputs by a softmax over a learned query or score."""
    return [found for found, pools in _own_softmax(model) if pools]


def _own_softmax(model: PreTrainedModel) -> Iterator[tuple[AttentionModule, bool]]:
    """Modules with a softmax attention of their own, and whether they merely pool."""
    for name, module, owner, _ in _walk(model):
        asks_within = any(asks_registry(type(child)) for child in module.modules())
        if computes_own_attention(type(module)) and not asks_within:
            parent = model.get_submodule(name.rpartition(".")[0])
            yield AttentionModule(name, module, owner, 0), _pools(module, parent)


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
_HEAD_DIMS = (
    "head_dim",
    "qk_head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
    "d_kv",
)


def num_heads(module: nn.Module) -> int | None:
    """Query heads of an attention module, `None` if unknown.

    Its own attribute, else its config's, else what its query projection and size of a head imply.
    """
    heads = _first_integer(module, _HEAD_COUNTS)
    dim, rows = _first_integer(module, _HEAD_DIMS), _query_rows(module)
    return rows // dim if heads is None and dim and rows else heads


def num_key_value_heads(module: nn.Module) -> int | None:
    """Key/value heads of an attention module, `None` if unknown; its query heads without grouping."""
    heads, group = num_heads(module), getattr(module, "num_key_value_groups", None)
    if heads is not None and isinstance(group, int | float) and group >= 1:
        return heads // int(group)
    given = _first_integer(module, ("num_key_value_heads",))
    return heads if given is None else given


def head_dim(module: nn.Module) -> int | None:
    """Size of a head's queries and keys, `None` if unknown; found as `num_heads` is."""
    dim = _first_integer(module, _HEAD_DIMS)
    heads, rows = _first_integer(module, _HEAD_COUNTS), _query_rows(module)
    return rows // heads if dim is None and heads and rows else dim


def _query_rows(module: nn.Module) -> int | None:
    """Features of all query heads together, read off a query or a query-key-value projection."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            if re.fullmatch(r"q_proj|query|linear_q", name):
                return child.out_features
            if name == "qkv":
                return child.out_features // 3
    return None


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
