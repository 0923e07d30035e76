"""Where this package hooks into Transformers; each hook does nothing for models without a mechanism.

* `PreTrainedModel.post_init` ends every model's and sub-model's constructor, inside whatever device
  and dtype context the loader chose: there attention modules get their children. The official
  alternative, `register_patch_mapping`, replaces classes by name: it needs a subclass of each attention
  class and is not applied by a direct constructor call, so it is the larger hook of the two.
* `PreTrainedModel._initialize_weights` is the loader's path for parameters that a checkpoint lacks;
  loaded ones are left alone there.
* `PreTrainedModel.get_correct_attn_implementation` and `set_attn_implementation` refuse what cannot
  work before anything changes.
* `PreTrainedModel.from_pretrained` and `_from_config` look at the finished model; the second takes the
  keyword `hf_expressive` (the first does already, through the config).
* `masking_utils._preprocess_mask_arguments` hands positions to the mask function where it would hide
  the pattern behind them (see `masking.mark_positions`), and says that it has looked at them.
* `ContinuousBatchingManager.switch_to_cb_friendly_attn` leaves a mechanism alone, where Transformers
  refuses every name but its own and swaps others for flash attention.
* `PreTrainedModel.save_pretrained` writes beside the target and renames; `push_to_hub` publishes with
  a model card (see `saving` and `hub`).
* `_get_resolved_checkpoint_files` tells which files the loader is about to read (see `checkpoint`).
* `PreTrainedConfig.hf_expressive` validates options wherever they come from.
* `PreTrainedConfig._remove_keys_not_serialized` and `get_config_dict` write and check what
  `config.json` says of a variant (see `checkpoint`); `_get_model_class` of the Auto classes gets the
  stock names of its `architectures`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils, modeling_utils
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.models.auto import auto_factory

from . import patcher, saving
from .attention.base import Mechanism
from .checkpoint import check_config_file, check_weight_files, stock_names, variant_names
from .config import SECTION, MechanismConfig, read_section
from .discovery import (
    asks_registry,
    attention_modules,
    computes_own_attention,
)
from .masking import mark_positions, remember_unbroken
from .registry import MECHANISMS, options_of

_INSTALLED = "_hf_expressive_installed"
#: Implementations of Transformers itself, and kernels of the Hub, which only a user can ask for.
_STOCK = re.compile(r"(paged\|)?(eager|sdpa|flex_attention|flash_attention.*|.*/.*)")


def install() -> None:
    """Installs every hook once."""
    if getattr(PreTrainedModel, _INSTALLED, False):
        return
    setattr(PreTrainedConfig, SECTION, property(_get_section, _set_section))
    _wrap(PreTrainedConfig, "_remove_keys_not_serialized", _keep_flag)
    _wrap(PreTrainedConfig, "get_config_dict", _get_config_dict)
    _wrap(auto_factory, "_get_model_class", _get_model_class)
    _wrap(PreTrainedModel, "post_init", _post_init)
    _wrap(PreTrainedModel, "_initialize_weights", _initialize_weights)
    _wrap(PreTrainedModel, "get_correct_attn_implementation", _get_correct_attn_implementation)
    _wrap(PreTrainedModel, "set_attn_implementation", _set_attn_implementation)
    _wrap(PreTrainedModel, "save_pretrained", saving.save_pretrained)
    _wrap(PreTrainedModel, "push_to_hub", saving.push_to_hub)
    _wrap(modeling_utils, "_get_resolved_checkpoint_files", _get_resolved_checkpoint_files)
    _wrap(PreTrainedModel, "from_pretrained", _from_pretrained)
    _wrap(PreTrainedModel, "_from_config", _from_config)
    _wrap(masking_utils, "_preprocess_mask_arguments", _preprocess_mask_arguments)
    _wrap(ContinuousBatchingManager, "switch_to_cb_friendly_attn", _switch_to_cb_friendly_attn)
    setattr(PreTrainedModel, _INSTALLED, True)


def _wrap(owner: type | ModuleType, name: str, hook: Callable[..., Any]) -> None:
    """Replaces a method, or a function of a module, by `hook(original, …)`."""
    declared = inspect.getattr_static(owner, name)
    is_classmethod = isinstance(declared, classmethod)
    original = declared.__func__ if is_classmethod else declared

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(owner, name, classmethod(replacement) if is_classmethod else replacement)


# ---- configs --------------------------------------------------------------------------------------


def _get_section(config: PreTrainedConfig) -> dict[str, Any] | None:
    return config.__dict__.get(SECTION)


def _set_section(config: PreTrainedConfig, value: Any) -> None:
    """Validates options and stores them as plain data, in sub-configs too.

    Options select their mechanism where no attention implementation has been chosen.
    """
    options = None if value is None else read_section(value)
    for part in patcher.configs_of(config):
        if options is None:
            part.__dict__.pop(SECTION, None)
            continue
        section = options.to_dict()
        if not isinstance(value, MechanismConfig) and "version" in value:
            section["version"] = value["version"]
        part.__dict__[SECTION] = section
    if options is not None and config._attn_implementation is None:
        config._attn_implementation = options.mechanism


def _keep_flag(original: Callable[..., None], config: PreTrainedConfig, d: dict[str, Any]) -> None:
    """Keeps the attention implementation of a config that uses a mechanism, sub-configs included.

    One name where the whole model has one, else the dict that Transformers takes. The options are
    written where the config has none, and `architectures` gets the names of a variant.
    """
    if "_attn_implementation_internal" in d:
        tree = _implementations(config)
        names = set(_leaves(tree))
        uses_mechanism = bool(names & set(MECHANISMS))
        if uses_mechanism:
            d["attn_implementation"] = tree[""] if len(names) == 1 else tree
            # Models ask for their config as a dict within `torch.compile`, which cannot follow this.
            if tree[""] in MECHANISMS and SECTION not in d:
                d[SECTION] = options_of(config, tree[""]).to_dict()
        else:
            # Switched off: the options must not select the mechanism again at the next load.
            d.pop(SECTION, None)
        if config.architectures:
            named = variant_names if uses_mechanism else stock_names
            d["architectures"] = named(config.architectures)
        for key in config.sub_configs:
            part = d.get(key)
            if isinstance(part, dict):
                part.pop("attn_implementation", None)
                if part.get(SECTION) == d.get(SECTION):
                    part.pop(SECTION, None)
    original(config, d)


def _get_config_dict(
    original: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
    cls: type[PreTrainedConfig],
    *args: Any,
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    content, unused = original(cls, *args, **kwargs)
    check_config_file(content)
    return content, unused


def _get_model_class(original: Callable[..., type], config: PreTrainedConfig, mapping: Any) -> type:
    """Where several classes fit a config, the Auto classes choose the one in `architectures`."""
    if names := config.architectures:
        config = copy.copy(config)
        config.architectures = stock_names(names)
    return original(config, mapping)


def _implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """{"": name, sub-config key: name or dict of the same form}."""
    tree: dict[str, Any] = {"": config._attn_implementation}
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            below = _implementations(part)
            tree[key] = below if len(below) > 1 else below[""]
    return tree


def _leaves(tree: dict[str, Any]) -> Iterator[str | None]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


# ---- construction ---------------------------------------------------------------------------------


def _post_init(original: Callable[..., None], model: PreTrainedModel) -> None:
    patcher.prepare(model)
    original(model)


def _initialize_weights(
    original: Callable[..., None],
    model: PreTrainedModel,
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    if not isinstance(module, Mechanism):
        original(model, module, *args, **kwargs)
    elif not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()
        module._is_hf_initialized = True  # type: ignore[assignment]


def _get_correct_attn_implementation(
    original: Callable[..., str],
    model: PreTrainedModel,
    requested_attention: str | None,
    is_init_check: bool = False,
) -> str:
    name = original(model, requested_attention, is_init_check)
    if name not in MECHANISMS:
        return name
    _refuse_class(type(model), name)
    if is_init_check:
        patcher.note_whole(model, name)
    else:
        options = options_of(model.config, name)
        bare = [
            found
            for found in attention_modules(model)
            if found.owner.config is model.config and not patcher.carries_mechanism(found.module)
        ]
        if options.needs_parameters and bare:
            raise ValueError(
                f"set_attn_implementation({name!r}) cannot create the learned parameters that the "
                f"options in config.{SECTION} need; use hf_expressive.attach(model, "
                f"{type(options).__name__}(…)) instead."
            )
    return name


def _refuse_class(cls: type[PreTrainedModel], name: str) -> None:
    """Refuses an architecture none of whose attention classes asks the registry."""
    classes = [
        value
        for value in vars(sys.modules[cls.__module__]).values()
        if inspect.isclass(value) and issubclass(value, nn.Module)
    ]
    if any(asks_registry(value) for value in classes):
        return
    own = [value.__name__ for value in classes if computes_own_attention(value)]
    if own:
        raise patcher.ForeignAttentionError(
            f'{cls.__name__} cannot run attn_implementation="{name}": {own[0]} computes its softmax '
            "itself and never asks Transformers' attention registry.",
            name,
        )


def _set_attn_implementation(
    original: Callable[..., None],
    model: PreTrainedModel,
    attn_implementation: str | dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    before = patcher.Snapshot.take(model)
    try:
        original(model, attn_implementation, *args, **kwargs)
        # Transformers only logs where a class cannot be switched.
        asked = attn_implementation if isinstance(attn_implementation, str) else ""
        if asked in MECHANISMS:
            patcher.refuse_foreign(model, patcher.foreign_parts(model), asked)
            if not attention_modules(model):
                raise ValueError(patcher.no_attention(model, asked))
        for found in attention_modules(model):
            # Some parts hold a copy of a config that belongs to no sub-model.
            config = patcher.own_config(found.module)
            if config is not None and patcher.implementation(found.owner) in MECHANISMS:
                config._attn_implementation_internal = patcher.implementation(found.owner)
        patcher.prepare(model)
    except BaseException:
        before.restore()
        raise


def _from_pretrained(
    original: Callable[..., Any], cls: type[PreTrainedModel], *args: Any, **kwargs: Any
) -> Any:
    given = kwargs.get("config")
    with _construction(
        cls,
        lambda: (
            given
            if isinstance(given, PreTrainedConfig)
            else cls.config_class.from_pretrained(*args[:1], **kwargs)  # type: ignore[union-attr]
        ),
    ) as outermost:
        built = original(cls, *args, **kwargs)
    if outermost:
        model = built[0] if isinstance(built, tuple) else built
        for config in patcher.configs_of(model.config):
            if config.architectures:
                config.architectures = stock_names(config.architectures)
        _look_over(model)
    return built


def _get_resolved_checkpoint_files(
    original: Callable[..., tuple[list[str] | None, Any]], *args: Any, **kwargs: Any
) -> tuple[list[str] | None, Any]:
    files, metadata = original(*args, **kwargs)
    check_weight_files(files or [])
    return files, metadata


def _from_config(
    original: Callable[..., PreTrainedModel],
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    **kwargs: Any,
) -> PreTrainedModel:
    if SECTION in kwargs:
        setattr(config, SECTION, kwargs.pop(SECTION))
    with _construction(cls, lambda: config) as outermost:
        model = original(cls, config, **kwargs)
    if outermost:
        _look_over(model)
    return model


_constructing: ContextVar[bool] = ContextVar("hf_expressive_constructing", default=False)


@contextlib.contextmanager
def _construction(
    cls: type[PreTrainedModel], config: Callable[[], PreTrainedConfig]
) -> Iterator[bool]:
    """Around a loader: tells whether it is the outermost one, for models build their parts by others.

    What a part refuses is said in terms of the whole model. Some architectures pick their attention
    class from a dict of their own and fail at the name of a mechanism.
    """
    outermost = not _constructing.get()
    token = _constructing.set(True)
    try:
        yield outermost
    except (KeyError, patcher.ForeignAttentionError) as error:
        name = error.args[0] if isinstance(error, KeyError) and error.args else None
        if isinstance(error, patcher.ForeignAttentionError):
            name = error.mechanism
        if name not in MECHANISMS:
            raise
        if outermost:
            patcher.refuse_architecture(cls, config(), name)
        if isinstance(error, patcher.ForeignAttentionError):
            raise
        raise patcher.ForeignAttentionError(
            f'{cls.__name__} cannot run attn_implementation="{name}": a part of it chooses its '
            "attention from a list of its own and never asks Transformers' attention registry.",
            name,
        ) from error
    finally:
        _constructing.reset(token)


def _look_over(model: PreTrainedModel) -> None:
    """Refuses a finished model without attention; warns if its mechanism has been overridden.

    Where something other than Transformers put its own attention in (serving engines do), no user
    asked for another model: that is refused.
    """
    names = {str(name) for name in _leaves(_implementations(model.config))}
    asked = sorted(names & set(MECHANISMS))
    if asked and not any(isinstance(module, Mechanism) for module in model.modules()):
        raise ValueError(patcher.no_attention(model, asked[0]))
    section = getattr(model.config, SECTION)
    if section is not None and not asked:
        if not _STOCK.fullmatch(str(model.config._attn_implementation)):
            raise ValueError(
                f'this checkpoint was made with attn_implementation="{section["mechanism"]}", and '
                f'"{model.config._attn_implementation}" would compute another function in its place: '
                "a program that brings an attention of its own cannot run it."
            )
        warnings.warn(
            f'this checkpoint was made with attn_implementation="{section["mechanism"]}" and is loaded '
            f'with "{model.config._attn_implementation}": it is another model now, and its outputs will '
            "not be those it was trained for.",
            UserWarning,
            stacklevel=4,
        )


def _preprocess_mask_arguments(
    original: Callable[..., tuple[Any, ...]],
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Any,
    past_key_values: Any,
    position_ids: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, ...]:
    early_exit, mask, packed, *sizes = original(
        config, inputs_embeds, attention_mask, past_key_values, position_ids, *args, **kwargs
    )
    if config._attn_implementation not in MECHANISMS:
        return early_exit, mask, packed, *sizes
    if not torch.compiler.is_compiling():
        looked = not early_exit and attention_mask is None and past_key_values is None
        remember_unbroken(position_ids if looked and packed is None else None)
    elif (
        position_ids is not None
        and position_ids.dim() == 2
        and attention_mask is None
        and not early_exit
        and sizes[0] == sizes[1] == position_ids.shape[1]
    ):
        is_packed = past_key_values is None
        mask = mark_positions(position_ids, inputs_embeds.shape[0], is_packed=is_packed)
        packed = None
    return early_exit, mask, packed, *sizes


def _switch_to_cb_friendly_attn(
    original: Callable[..., None],
    manager: ContinuousBatchingManager,
    model: PreTrainedModel,
    *args: Any,
    **kwargs: Any,
) -> None:
    used = {str(name) for name in _leaves(_implementations(model.config))} & set(MECHANISMS)
    text = str(model.config.get_text_config()._attn_implementation)
    if not used:
        original(manager, model, *args, **kwargs)
    elif text not in used:
        raise ValueError(
            f'continuous batching would switch the whole model, of which "{text}" writes the text and '
            f"another part runs {sorted(used)}; use generate()."
        )
    elif "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
        raise ValueError(
            f'attn_implementation="{text}" runs with continuous batching from Transformers 5.23 on; '
            "update it, or use generate()."
        )
