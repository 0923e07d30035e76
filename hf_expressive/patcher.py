"""Mechanisms onto the attention modules of a model, and off again.

`attach` and `detach` change a model that exists. `prepare` runs at the end of every model's
constructor (see `hooks`) and gives the attention modules their child before weights are initialised or
loaded. All three collect and validate first and change afterwards.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .attention.base import Mechanism
from .config import SECTION, MechanismConfig
from .discovery import AttentionModule, attention_modules, foreign_modules
from .registry import CHILD, MECHANISMS, options_of

Children = list[tuple[AttentionModule, Mechanism]]
#: Attribute of a model under construction: the mechanism that all of it is to run.
_WHOLE = "_hf_expressive_whole"


class ForeignAttentionError(ValueError):
    """Some attention of a model would go on as softmax whatever was asked for."""

    def __init__(self, message: str, mechanism: str) -> None:
        super().__init__(message)
        self.mechanism = mechanism


def attach(model: PreTrainedModel, config: MechanismConfig) -> PreTrainedModel:
    """Puts a mechanism onto a loaded model, its parameters initialised: all or nothing.

    Args:
        model: any model whose attention asks the registry. Its sub-models are switched as well; to
            change one part of a composite model, pass that part.
        config: the options; their class selects the mechanism.

    Returns:
        The same model.

    Raises:
        TypeError: `config` is not one of this package's config classes.
        ValueError: the model cannot run the mechanism, or the options do not fit it. Nothing has
            changed then.
    """
    if not isinstance(config, MechanismConfig):
        raise TypeError(
            f"attach(model, config) needs one of this package's config classes, got {config!r}."
        )
    name = config.mechanism
    found = attention_modules(model)
    refuse_foreign(model, foreign_parts(model), name)
    if not found:
        raise ValueError(no_attention(model, name))
    children = make_children(found, config)

    before = Snapshot.take(model)
    try:
        remove_children(model)
        add_children(children)
        for _, child in children:
            child.reset_parameters()
        setattr(model.config, SECTION, config)
        switch(model, name)
    except BaseException:
        before.restore()
        raise
    return model


def detach(model: PreTrainedModel, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """Takes a mechanism off a model: children with their parameters, options, flag. All or nothing.

    Args:
        model: a model with a mechanism.
        attn_implementation: what it runs on afterwards, e.g. `"eager"` where an architecture does
            not support `"sdpa"`.

    Returns:
        The same model.

    Raises:
        ValueError: the model carries no mechanism, or does not support `attn_implementation`. Nothing
            has changed then.
    """
    if not any(carries_mechanism(found.module) for found in attention_modules(model)):
        raise ValueError(f"{type(model).__name__} carries no mechanism of hf_expressive.")
    before = Snapshot.take(model)
    try:
        remove_children(model)
        setattr(model.config, SECTION, None)
        switch(model, attn_implementation)
    except BaseException:
        before.restore()
        raise
    return model


def foreign_parts(model: PreTrainedModel) -> list[AttentionModule]:
    """The foreign attention that an implementation set for the whole model is meant to reach."""
    reached = {id(config) for config in configs_of(model.config)}
    return [found for found in foreign_modules(model) if id(found.owner.config) in reached]


def prepare(model: PreTrainedModel) -> None:
    """Gives every attention module whose config asks for a mechanism its child, if it has none.

    Parameters are left to the loader's initialisation.

    Raises:
        ForeignAttentionError: a part that is asked to run a mechanism cannot.
        ValueError: options do not fit.
    """
    if (name := model.__dict__.get(_WHOLE)) is not None:
        # Some models build parts from configs beside their own, or let a part's constructor reset it.
        reached = [part.config for part in submodels(model)]
        reached += [c for f in attention_modules(model) if (c := own_config(f.module)) is not None]
        for config in reached:
            config._attn_implementation_internal = name
            if getattr(model.config, SECTION) is not None:
                config.__dict__.setdefault(SECTION, getattr(model.config, SECTION))
    wanted = [f for f in attention_modules(model) if runs(f) in MECHANISMS]
    foreign = [f for f in foreign_modules(model) if implementation(f.owner) in MECHANISMS]
    if foreign:
        refuse_foreign(model, foreign, implementation(foreign[0].owner))
    children: Children = []
    for first in {(id(found.owner), runs(found)): found for found in wanted}.values():
        owner = first.owner
        options = options_of(owner.config, runs(first))
        record(owner.config, options)
        of_owner = [f for f in wanted if f.owner is owner and runs(f) == runs(first)]
        missing = [found for found in of_owner if not carries_mechanism(found.module)]
        check_layers(of_owner, options)
        children += make_children(missing, options)
    add_children(children)
    model.__dict__.pop(_WHOLE, None)
    if implementation(model) in MECHANISMS:
        record(model.config, options_of(model.config, implementation(model)))


def note_whole(model: PreTrainedModel, name: str) -> None:
    """Notes at the start of a constructor whether all of the model is to run one mechanism."""
    if all(part._attn_implementation in (name, None) for part in configs_of(model.config)):
        setattr(model, _WHOLE, name)


def record(config: PreTrainedConfig, options: MechanismConfig) -> None:
    """Writes the options down where a config has none: defaults may change, a checkpoint must not."""
    config.__dict__.setdefault(SECTION, options.to_dict())


def own_config(module: nn.Module) -> PreTrainedConfig | None:
    """The config that an attention module itself holds; it asks this one for the implementation."""
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def runs(found: AttentionModule) -> str:
    """The attention implementation that a module runs: its own config decides, else its owner's."""
    config = own_config(found.module)
    return str((found.owner.config if config is None else config)._attn_implementation)


def carries_mechanism(module: nn.Module) -> bool:
    return isinstance(module._modules.get(CHILD), Mechanism)


def implementation(model: PreTrainedModel) -> str:
    """The attention implementation in a model's own config."""
    return str(model.config._attn_implementation)


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and its sub-configs, at any depth."""
    yield config
    for key in config.sub_configs:
        sub_config = getattr(config, key, None)
        if isinstance(sub_config, PreTrainedConfig):
            yield from configs_of(sub_config)


def make_children(modules: list[AttentionModule], options: MechanismConfig) -> Children:
    """One child for each attention module, on its device and in its dtype, not yet attached.

    Raises:
        ValueError: options that do not fit a module; its path is in the message.
    """
    check_layers(modules, options)
    entry = MECHANISMS[options.mechanism]
    children = []
    for found in modules:
        try:
            child = entry.module.of(options, found)
        except ValueError as error:
            raise ValueError(f"{found.name}: {error}") from None
        parameter = next((p for p in found.module.parameters() if p.is_floating_point()), None)
        if parameter is not None:
            # A loader builds without memory, though some modules have a parameter that does.
            meta = any(own.is_meta for own in child.parameters())
            child.to(device="meta" if meta else parameter.device, dtype=parameter.dtype)
        children.append((found, child))
    return children


def check_layers(modules: list[AttentionModule], options: MechanismConfig) -> None:
    """Raises ValueError if a softmax layer does not exist in one of the (sub-)models."""
    for owner in {id(found.owner): found.owner for found in modules}.values():
        layers = 1 + max(found.layer for found in modules if found.owner is owner)
        beyond = [layer for layer in options.softmax_layers if layer >= layers]
        if beyond:
            raise ValueError(
                f"softmax_layers contains {beyond[0]}, but {type(owner).__name__} has {layers} "
                f"attention layers (0 to {layers - 1})."
            )


def add_children(children: Children) -> None:
    for found, child in children:
        found.module.add_module(CHILD, child)
        child.train(found.module.training)


def remove_children(model: PreTrainedModel) -> None:
    for found in attention_modules(model):
        if carries_mechanism(found.module):
            delattr(found.module, CHILD)


def switch(model: PreTrainedModel, name: str) -> None:
    """`set_attn_implementation`, with an error where Transformers only logs that nothing happened.

    Raises:
        ValueError: some attention of the model kept its old implementation.
    """
    model.set_attn_implementation(name)
    for found in attention_modules(model):
        # Transformers before 5.23 does not hand the name on to parts that have a copy of the config.
        if found.owner is not model and implementation(found.owner) != name:
            found.owner.set_attn_implementation(name)
    kept = [found for found in attention_modules(model) if implementation(found.owner) != name]
    if kept:
        raise ValueError(
            f"{type(kept[0].owner).__name__} does not let its attention implementation be set to "
            f"{name!r}."
        )


def submodels(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Every `PreTrainedModel` within a model, itself included."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def refuse_foreign(model: PreTrainedModel, foreign: list[AttentionModule], name: str) -> None:
    """Raises ForeignAttentionError if there is any foreign attention."""
    if not foreign:
        return
    first = foreign[0]
    reason = (
        f'{type(model).__name__} cannot run attn_implementation="{name}": {first.name or "it"} '
        f"({type(first.module).__name__}) computes its softmax itself and never asks Transformers' "
        "attention registry."
    )
    unable = {id(f.owner.config) for f in foreign}
    asking = attention_modules(model)
    able = {id(f.owner.config) for f in asking} | {id(own_config(f.module)) for f in asking}
    able -= unable
    if able & {id(part) for part in configs_of(model.config)}:
        parts = json.dumps(_per_part(model.config, able, name))
        reason += f" Name the parts that do: attn_implementation={parts}."
    raise ForeignAttentionError(reason, name)


def refuse_architecture(cls: type[PreTrainedModel], config: PreTrainedConfig, name: str) -> None:
    """Refuses a model of which a part could not be built, in terms of the whole model.

    Its parts are seen by building it without memory, on eager attention.

    Raises:
        ForeignAttentionError: with the remedy, if there is one.
    """
    config = copy.deepcopy(config)
    setattr(config, SECTION, None)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = cls(config)
    refuse_foreign(model, foreign_modules(model), name)


def _per_part(config: PreTrainedConfig, able: set[int], name: str) -> dict[str, Any]:
    """The implementation of a config and of its sub-configs, as Transformers takes it."""
    tree: dict[str, Any] = {"": name if id(config) in able else "eager"}
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            below = _per_part(part, able, name)
            tree[key] = below if len(below) > 1 else below[""]
    return tree


def no_attention(model: PreTrainedModel, name: str) -> str:
    return (
        f'{type(model).__name__} cannot run attn_implementation="{name}": no module of it asks '
        "Transformers' attention registry."
    )


@dataclass(frozen=True)
class Snapshot:
    """Children and configs of a model, to go back to when a change fails.

    Configs as a whole, because Transformers leaves marks of its own on them when it switches.
    """

    children: list[tuple[nn.Module, nn.Module | None]]
    configs: list[tuple[PreTrainedConfig, dict[str, Any]]]

    @classmethod
    def take(cls, model: PreTrainedModel) -> Snapshot:
        modules = [found.module for found in attention_modules(model)]
        parts = [part.config for part in submodels(model)]
        parts += [config for config in map(own_config, modules) if config is not None]
        configs = {id(config): config for part in parts for config in configs_of(part)}
        return cls(
            [(module, module._modules.get(CHILD)) for module in modules],
            [(config, dict(config.__dict__)) for config in configs.values()],
        )

    def restore(self) -> None:
        for module, child in self.children:
            module._modules.pop(CHILD, None)
            if child is not None:
                module.add_module(CHILD, child)
        for config, attributes in self.configs:
            config.__dict__.clear()
            config.__dict__.update(attributes)
