"""attach and detach: all or nothing, on the whole model or a part of it."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import llama, llama_config, llava, llava_inputs, logits, train_gains
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SamConfig,
    SamModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5Model,
)

from hf_expressive import ExpressiveConfig, attach, detach, explain, patcher
from hf_expressive.attention.base import AttentionCall, Mechanism
from hf_expressive.attention.expressive import ExpressiveAttention
from hf_expressive.config import SECTION
from hf_expressive.discovery import attention_modules
from hf_expressive.registry import CHILD


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that attach and detach may touch."""
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "keys in order": list(model.state_dict()),
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "configs": [copy.deepcopy(part.config.__dict__) for part in parts],
        "implementations": [part.config._attn_implementation for part in parts],
        "training": [module.training for module in model.modules()],
    }


def assert_unchanged(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = state_of(model)
    for name, value in after.pop("state").items():
        assert torch.equal(value, before["state"][name]), name
    assert after == {name: value for name, value in before.items() if name != "state"}


def children(model: PreTrainedModel) -> list[Mechanism]:
    return [module for module in model.modules() if isinstance(module, Mechanism)]


# ---- attach ---------------------------------------------------------------------------------------


def test_attach_changes_what_attention_is() -> None:
    model = llama(attn_implementation="sdpa")
    before = logits(model)
    assert attach(model, ExpressiveConfig(scale="learned", power=2.0)) is model
    assert len(children(model)) == 2
    assert all(isinstance(child, ExpressiveAttention) for child in children(model))
    assert [child.layer for child in children(model)] == [0, 1]
    assert model.config._attn_implementation == "expressive"
    assert getattr(model.config, SECTION)["power"] == 2.0
    gains = [value for name, value in model.named_parameters() if "log_gain" in name]
    assert [gain.shape for gain in gains] == [(4,), (4,)]
    assert all((gain == 0).all() and gain.requires_grad for gain in gains)
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1.0},
        {"power": 2.0},
        {"scale": "learned", "gain": 0.3},
        {"sink": True},
        {"softmax_layers": (0,)},
        {"softmax_layers": (1,)},
        {"softmax_heads": 2},
    ],
    ids=str,
)
def test_every_option_changes_the_output(options: dict[str, Any]) -> None:
    plain = logits(attach(llama(), ExpressiveConfig()))
    assert (logits(attach(llama(), ExpressiveConfig(**options))) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"softmax_layers": (0, 1)}, {"softmax_heads": 4}], ids=str)
def test_all_softmax_is_the_stock_model(options: dict[str, Any]) -> None:
    """A hybrid without any expressive head left is the model one started from."""
    model = llama(attn_implementation="eager")
    before = logits(model)
    torch.testing.assert_close(logits(attach(model, ExpressiveConfig(**options))), before)


def test_learned_gain_scales_its_head() -> None:
    """exp(log_gain) multiplies the score: one gain for all heads equals a number as scale."""
    learned = attach(llama(), ExpressiveConfig(scale="learned"))
    torch.testing.assert_close(logits(learned), logits(attach(llama(), ExpressiveConfig())))
    with torch.no_grad():
        for child in children(learned):
            child.gain.log_gain.fill_(1.5)
    scale = 4**-0.5 * torch.tensor(1.5).exp().item()
    expected = logits(attach(llama(), ExpressiveConfig(scale=scale)))
    torch.testing.assert_close(logits(learned), expected)


def test_learned_sink_joins_the_row_sum() -> None:
    """exp(s) beside a row sum L: the output of a head shrinks by L / (L + exp(s)), and s is learned."""
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    child = children(attach(llama(num_key_value_heads=4), ExpressiveConfig(sink=True)))[0]
    call = AttentionCall(query, key, value, scaling=0.5)
    out, weights = child(replace(call, return_weights=True))
    assert weights is not None
    plain, _ = ExpressiveAttention(ExpressiveConfig(), layer=0, heads=4, kv_heads=4)(call)
    score = 0.25 * (query @ key.transpose(-1, -2)).square()
    row_sum = (score / (1 + score)).sum(-1, keepdim=True)
    torch.testing.assert_close(out, plain * row_sum / (row_sum + 1))
    torch.testing.assert_close(weights.sum(-1, keepdim=True), row_sum / (row_sum + 1))
    # A sink of the model itself counts beside it.
    both, _ = child(replace(call, sinks=torch.tensor([0.0, 1.0, 2.0, 3.0])))
    sink = 1 + torch.tensor([0.0, 1.0, 2.0, 3.0]).exp().view(1, 4, 1, 1)
    torch.testing.assert_close(both, plain * row_sum / (row_sum + sink))
    out.sum().backward()
    assert (child.sink.log_weight.grad != 0).all()


def test_attach_again_replaces() -> None:
    model = attach(llama(), ExpressiveConfig(scale="learned"))
    train_gains(model)
    attach(model, ExpressiveConfig(power=3.0))
    assert not any("log_gain" in name for name in model.state_dict())
    attach(model, ExpressiveConfig(scale="learned"))
    assert all((child.gain.log_gain == 0).all() for child in children(model))


def test_attach_keeps_mode_dtype_and_freezing() -> None:
    model = llama().to(torch.bfloat16)
    model.requires_grad_(False)
    model.train()
    attach(model, ExpressiveConfig(scale="learned"))
    assert all(child.gain.log_gain.dtype == torch.bfloat16 for child in children(model))
    assert all(child.training for child in children(model))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "log_gain" not in n)


def test_attach_to_a_part() -> None:
    """The language model of a vision-language model, the tower left alone, and back."""
    model = llava(attn_implementation="sdpa")
    before, stock = state_of(model), logits(model, **llava_inputs())
    attach(model.model.language_model, ExpressiveConfig(scale="learned"))
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "expressive"
    assert len(children(model)) == 2
    assert not children(model.model.vision_tower)
    assert (logits(model, **llava_inputs()) - stock).abs().max() > 1e-3
    detach(model.model.language_model)
    assert_unchanged(model, before)


def test_attach_to_a_composite_model() -> None:
    model = attach(llava(), ExpressiveConfig())
    assert len(children(model)) == 5
    assert sorted(child.layer for child in children(model)) == [0, 0, 1, 1, 2]
    # A layer that only the tower has does not exist in the language model.
    with pytest.raises(ValueError, match="softmax_layers contains 2"):
        attach(llava(), ExpressiveConfig(softmax_layers=(2,)))


def test_layers_are_counted_in_order_within_each_part() -> None:
    """Self- and cross-attention of one layer share its index, in every naming scheme."""
    bart = BartModel(
        BartConfig(
            vocab_size=16,
            d_model=8,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
        )
    )
    t5 = T5Model(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    for model in (bart, t5):
        layers: dict[str, list[int]] = {}
        for found in attention_modules(model):
            layers.setdefault(found.name.split(".")[0], []).append(found.layer)
        assert layers == {"encoder": [0, 1], "decoder": [0, 0, 1, 1]}, type(model).__name__


def test_shared_layers_share_the_child() -> None:
    """ALBERT runs one layer several times: one attention module, one child."""
    config = AlbertConfig(
        vocab_size=16,
        embedding_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    assert len(children(attach(AlbertModel(config), ExpressiveConfig()))) == 1


# ---- what is refused, and that nothing changes then -----------------------------------------------

_BLOOM = BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2)
_DEBERTA = DebertaV2Config(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)
_GPTJ = GPTJConfig(vocab_size=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)
_RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
FOREIGN: list[tuple[Callable[..., PreTrainedModel], Any, str]] = [
    (BloomForCausalLM, _BLOOM, "Bloom"),
    (DebertaV2Model, _DEBERTA, "DebertaV2|Disentangled"),
    (GPTJForCausalLM, _GPTJ, "GPTJ"),
    (ResNetModel, _RESNET, "ResNet"),
]


@pytest.mark.parametrize(("cls", "config", "name"), FOREIGN, ids=[n for *_, n in FOREIGN])
@pytest.mark.parametrize("how", ["attach", "set"])
def test_foreign_attention_is_refused(
    cls: type[PreTrainedModel], config: Any, name: str, how: str
) -> None:
    """Attention that never asks the registry would go on as softmax: refused, with the reason."""
    model = cls(copy.deepcopy(config))
    before = state_of(model)
    refused = pytest.raises(ValueError, match=f"({name}).*expressive")
    if how == "attach":
        with refused:
            attach(model, ExpressiveConfig())
    else:
        with refused:
            model.set_attn_implementation("expressive")
    assert_unchanged(model, before)


@pytest.mark.parametrize(("cls", "config", "name"), FOREIGN, ids=[n for *_, n in FOREIGN])
@pytest.mark.parametrize("how", ["argument", "config", "section"])
def test_foreign_architecture_is_not_built(
    cls: type[PreTrainedModel], config: Any, name: str, how: str
) -> None:
    config = copy.deepcopy(config)
    options: dict[str, Any] = {}
    if how == "argument":
        options["attn_implementation"] = "expressive"
    elif how == "config":
        config._attn_implementation = "expressive"
    else:
        setattr(config, SECTION, ExpressiveConfig())
    with pytest.raises(ValueError, match=f"({name}).*expressive"):
        cls._from_config(config, **options)


def test_refusal_names_the_parts_that_do() -> None:
    """A model of which one part cannot is refused in terms of all of it, with what to pass instead."""
    config = SamConfig(
        vision_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        mask_decoder_config={"hidden_size": 16, "num_hidden_layers": 1},
    )
    with torch.device("meta"), pytest.raises(ValueError, match="registry") as refused:
        SamModel._from_config(config, attn_implementation="expressive")
    message = str(refused.value)
    assert message.startswith("SamModel cannot run"), message
    assert "vision_encoder.layers.0.attn (SamVisionAttention)" in message
    remedy = re.search(r"attn_implementation=(\{.*\})", message)
    assert remedy is not None, message
    parts = json.loads(remedy.group(1))
    assert parts["vision_config"] == "eager"
    assert parts["mask_decoder_config"] == "expressive"
    with torch.device("meta"):
        model = SamModel._from_config(config, attn_implementation=parts)
    assert children(model)
    own = [row.name for row in explain(model).layers if row.mechanism == "its own"]
    assert own == ["vision_encoder.layers.0.attn", "vision_encoder.layers.1.attn"]


def test_pooling_is_no_attention() -> None:
    """A head that pools by one learned query compares no tokens: it stays, and `explain` says so."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    model = SiglipVisionModel._from_config(config, attn_implementation="expressive")
    rows = {row.name.rpartition(".")[2]: row.mechanism for row in explain(model).layers}
    assert rows == {"self_attn": "expressive", "attention": "its own"}
    # The same module within an encoder layer is attention.
    layer = model.base_model.get_submodule(
        next(f.name for f in attention_modules(model)).rpartition(".")[0]
    )
    layer.self_attn = nn.MultiheadAttention(16, 2)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        attach(model, ExpressiveConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_heads": 1}, "softmax_heads must be a multiple of 2"),
        ({"softmax_heads": 6}, "softmax_heads.*up to 4"),
        ({"softmax_layers": (2,)}, r"softmax_layers contains 2.*0 to 1"),
    ],
)
@pytest.mark.parametrize("how", ["attach", "constructor", "set"])
def test_unfitting_options_are_refused(options: dict[str, Any], message: str, how: str) -> None:
    model = llama()
    section = ExpressiveConfig(**options)
    if how == "set":
        setattr(model.config, SECTION, section)
    before = state_of(model)
    refused: dict[str, Callable[[], Any]] = {
        "attach": lambda: attach(model, section),
        "set": lambda: model.set_attn_implementation("expressive"),
        "constructor": lambda: LlamaForCausalLM(llama_config(**{SECTION: section})),
    }
    with pytest.raises(ValueError, match=message):
        refused[how]()
    assert_unchanged(model, before)


def test_wrong_argument_is_refused() -> None:
    model = llama()
    before = state_of(model)
    for wrong in ({"mechanism": "expressive"}, "expressive", None):
        with pytest.raises(TypeError, match="config"):
            attach(model, wrong)  # type: ignore[arg-type]
    assert_unchanged(model, before)


def test_set_attn_implementation_without_parameters() -> None:
    model = llama()
    model.set_attn_implementation("expressive")
    assert torch.equal(logits(model), logits(attach(llama(), ExpressiveConfig())))
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), logits(llama()))


def test_set_attn_implementation_refuses_parameters() -> None:
    model = llama()
    setattr(model.config, SECTION, ExpressiveConfig(scale="learned"))
    before = state_of(model)
    with pytest.raises(ValueError, match="attach"):
        model.set_attn_implementation("expressive")
    assert_unchanged(model, before)


def test_unprepared_module_is_refused() -> None:
    """A module that was switched behind the package's back says what to do."""
    model = llama()
    model.config._attn_implementation = "expressive"
    with pytest.raises(RuntimeError, match="attach"):
        logits(model)


# ---- detach ---------------------------------------------------------------------------------------


def test_detach_undoes_attach() -> None:
    model = llama(attn_implementation="sdpa")
    before = state_of(model)
    detach(attach(model, ExpressiveConfig(scale="learned", softmax_layers=(0,))))
    assert_unchanged(model, before)


def test_detach_to_eager() -> None:
    model = detach(attach(llama(), ExpressiveConfig()), "eager")
    assert model.config._attn_implementation == "eager"
    assert not children(model)


def test_detach_refuses() -> None:
    with pytest.raises(ValueError, match="no mechanism"):
        detach(llama())
    model = attach(llama(), ExpressiveConfig(scale="learned"))
    train_gains(model)
    before = state_of(model)
    with pytest.raises(ValueError, match="fast"):
        detach(model, "fast")
    assert_unchanged(model, before)


# ---- all or nothing -------------------------------------------------------------------------------


class Injected(Exception):
    pass


def _failing(original: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """A function that raises once, after `calls` calls that work."""
    count = itertools.count()

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(count) == calls:
            raise Injected
        return original(*args, **kwargs)

    return function


_STEPS: list[tuple[Any, str, int]] = [
    (patcher, "attention_modules", 0),
    (patcher, "make_children", 0),
    (patcher, "remove_children", 0),
    (patcher, "add_children", 0),
    (patcher, "switch", 0),
    (patcher, "submodels", 1),
    (ExpressiveAttention, "__init__", 0),
    (ExpressiveAttention, "__init__", 1),
    (ExpressiveAttention, "reset_parameters", 0),
    (ExpressiveAttention, "reset_parameters", 1),
    (nn.Module, "add_module", 1),
    (PreTrainedModel, "get_correct_attn_implementation", 0),
    (PreTrainedModel, "set_attn_implementation", 0),
]


@pytest.mark.parametrize(
    ("owner", "name", "calls"), _STEPS, ids=[f"{name} {calls}" for _, name, calls in _STEPS]
)
@pytest.mark.parametrize("start", ["plain", "variant"])
@pytest.mark.parametrize("action", ["attach", "detach", "set"])
def test_all_or_nothing(
    owner: Any, name: str, calls: int, start: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails, the model is what it was."""
    model = llama(attn_implementation="sdpa")
    if start == "variant":
        train_gains(attach(model, ExpressiveConfig(scale="learned", power=2.0)))
    before = state_of(model)
    injected = False
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _failing(getattr(owner, name), calls))
        try:
            if action == "attach":
                attach(model, ExpressiveConfig(scale="learned"))
            elif action == "detach":
                detach(model)
            else:
                model.set_attn_implementation("expressive" if start == "plain" else "sdpa")
        except (Injected, ValueError) as error:
            injected = isinstance(error, Injected)
            assert_unchanged(model, before)
    if action == "attach" and start == "plain":
        assert injected, f"attach never came to {name}"
    assert logits(model).isfinite().all()


def test_all_or_nothing_in_a_composite_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the last part leaves the first parts as they were."""
    model = llava(attn_implementation="sdpa")
    before = state_of(model)
    original = PreTrainedModel.get_correct_attn_implementation
    for calls in range(3):
        with monkeypatch.context() as patch:
            failing = _failing(original, calls)
            patch.setattr(PreTrainedModel, "get_correct_attn_implementation", failing)
            with pytest.raises(Injected):
                attach(model, ExpressiveConfig(scale="learned"))
        assert_unchanged(model, before)


def test_children_are_modules_of_their_attention() -> None:
    """The child sits where FSDP, PEFT and state dicts look: a registered sub-module."""
    model = attach(llama(), ExpressiveConfig(scale="learned"))
    for found in attention_modules(model):
        assert found.module._modules[CHILD] is getattr(found.module, CHILD)
        assert f"{found.name}.{CHILD}.gain.log_gain" in model.state_dict()
