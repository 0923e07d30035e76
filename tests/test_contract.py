"""The contract with Transformers on tiny random models, against a dense witness of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import checks, dense
from architectures.builder import Case, build
from tiny import SIZES, llama, llama_config, logits, tokens
from tolerances import LOGITS
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_expressive import ExpressiveConfig, attach, masking
from hf_expressive.attention import contract
from hf_expressive.attention.base import Mechanism
from hf_expressive.discovery import attention_modules
from hf_expressive.masking import compact_mask
from hf_expressive.registry import CHILD

DECODERS = ("llama", "mistral", "qwen3", "gemma2", "gpt_oss", "gpt2")
ENCODERS = ("bert", "modernbert")
ENCODER_DECODERS = ("t5", "bart", "whisper")
VISION = ("vit", "clip", "qwen2_vl")
NAMES = DECODERS + ENCODERS + ENCODER_DECODERS + VISION

dense.register()


# The other names are in the sample of the architecture tests, with the same checks.
@pytest.mark.filterwarnings("ignore")  # what models of Transformers warn about
@pytest.mark.parametrize("name", ["qwen3", "qwen2_vl"])
@pytest.mark.parametrize("check", [*checks.OF_WITNESS, *checks.OF_PACKAGE])
def test_architecture(check: Callable[[str], None], name: str) -> None:
    """Padding, gradients, caches, reloading and bfloat16."""
    try:
        check(name)
    except checks.NotApplicable as reason:
        pytest.skip(str(reason))


def pair(name: str) -> tuple[Case, Case]:
    """The package and the witness with the same weights."""
    ours, witness = build(name, "expressive"), build(name, dense.EXPRESSIVE)
    ours.model.load_state_dict(witness.model.state_dict())
    return ours, witness


# ---- attach on a model that exists ----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "t5gemma"])
def test_attach_equals_construction(name: str) -> None:
    """A loaded model that is switched is the model that is built with the mechanism."""
    built, loaded = build(name, "expressive"), build(name, "eager")
    loaded.model.load_state_dict(built.model.state_dict())
    attach(loaded.model, ExpressiveConfig())
    for found in attention_modules(loaded.model):
        assert isinstance(found.module._modules[CHILD], Mechanism)
        config = getattr(found.module, "config", loaded.model.config)
        assert config._attn_implementation == "expressive", found.name
    inputs = built.inputs()
    checks.assert_same(
        checks.run(loaded, inputs), checks.run(built, inputs), inputs, "after attach"
    )


# ---- attention weights ----------------------------------------------------------------------------


def attentions(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of attention weights in the outputs of a model."""
    for name, value in outputs.items():
        if isinstance(value, (tuple, list)) and "attentions" in name:
            yield from ((f"{name} {i}", weights) for i, weights in enumerate(value))
        elif hasattr(value, "items"):
            yield from ((f"{name}.{below}", weights) for below, weights in attentions(value))


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_output_attentions(name: str, padding: Any) -> None:
    """The weights are those of the witness, sum to one, and asking for them changes nothing."""
    ours, witness = pair(name)
    inputs = witness.inputs(padding)
    if padding != "none" and "attention_mask" not in inputs:
        pytest.skip("takes no padded text")
    theirs = dict(attentions(witness.model(**copy.deepcopy(inputs), output_attentions=True)))
    outputs = ours.model(**copy.deepcopy(inputs), output_attentions=True)
    mine = dict(attentions(outputs))
    assert mine.keys() == theirs.keys()
    assert mine, "the model returned no attention weights"
    for place, weights in mine.items():
        assert weights.shape == theirs[place].shape, place
        assert (weights - theirs[place]).abs().max() < LOGITS, place
        total = weights.sum(dim=-1)
        if name == "gpt_oss":
            assert ((total >= 0) & (total < 1)).all(), "the sink takes a share"
        else:
            whole = (total - 1).abs() < 1e-5
            assert (whole | (total == 0)).all(), place
            assert whole.any(), place
    without = dict(checks.tensors(ours.model(**copy.deepcopy(inputs))))
    checks.assert_same(dict(checks.tensors(outputs)), without, inputs, "with weights")


# ---- gradient checkpointing -----------------------------------------------------------------------


def backward(outputs: dict[str, Tensor]) -> None:
    """Backward from all outputs of a model."""
    values = [value for value in outputs.values() if value.requires_grad]
    sum((v.nan_to_num(0.0, 0.0, 0.0).square().mean() for v in values), torch.zeros(())).backward()


def taken(model: nn.Module) -> dict[str, Tensor]:
    """Takes the gradients that have come together off a model."""
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gradients(case: Case, inputs: dict[str, Any], seed: int = 7) -> dict[str, Tensor]:
    """Gradients of a model as it is, dropout included, from one seed."""
    torch.manual_seed(seed)
    backward(dict(checks.tensors(case.model(**copy.deepcopy(inputs)))))
    return taken(case.model)


def _set_dropout(model: nn.Module, probability: float) -> int:
    """Gives every attention module a dropout of its weights, whatever its name; returns how many."""
    count = 0
    for module in model.modules():
        if not isinstance(getattr(module, CHILD, None), Mechanism):
            continue
        for name in ("attention_dropout", "attn_dropout", "dropout", "dropout_prob"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout):
                value.p = probability
            elif isinstance(value, (int, float)):
                setattr(module, name, probability)
            else:
                continue
            count += 1
    return count


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str) -> None:
    """A recomputed block draws the same dropout: the gradients are the same."""
    case = build(name, "expressive")
    inputs = case.inputs() | ({"use_cache": False} if name in DECODERS else {})
    case.model.train()
    assert _set_dropout(case.model, 0.3)
    stored, other = gradients(case, inputs), gradients(case, inputs, seed=8)
    assert any(not torch.equal(value, other[key]) for key, value in stored.items())
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(case, inputs)
    assert stored.keys() == recomputed.keys()
    for key, value in stored.items():
        torch.testing.assert_close(recomputed[key], value, msg=f"the gradient of {key}")


def test_dropout_acts_in_training_only() -> None:
    model = attach(llama(attention_dropout=0.5), ExpressiveConfig())
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.allclose(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(attach(llama(), ExpressiveConfig())))


# ---- torch.compile --------------------------------------------------------------------------------


#: With and without padding where both are quick, else the harder of the two.
COMPILED = [
    ("llama", "none"),
    ("bert", "none"),
    ("vit", "none"),
    ("t5", "none"),
    ("qwen2_vl", "none"),
]
COMPILED += [(name, "left") for name in NAMES if name not in ("vit", "whisper", "qwen2_vl")]


@pytest.mark.parametrize(("name", "padding"), COMPILED)
def test_compile(name: str, padding: Any) -> None:
    """One graph, forward and backward, wherever the stock model compiles to one graph."""
    case = build(name, "expressive")
    inputs = case.inputs(padding)
    if name in DECODERS:
        inputs["use_cache"] = False
    torch.compiler.reset()
    try:
        stock = build(name, "sdpa" if type(case.model)._supports_sdpa else "eager").model
        torch.compile(stock, fullgraph=True, backend="eager")(**copy.deepcopy(inputs))
    except Exception as error:  # whatever hinders the stock model
        pytest.skip(f"the stock model does not compile: {type(error).__name__}: {error}"[:200])
    torch.compiler.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    outputs = dict(checks.tensors(compiled(**copy.deepcopy(inputs))))
    with torch.no_grad():
        checks.assert_same(outputs, checks.run(case, inputs), inputs, "compiled")
    backward(outputs)
    found = taken(case.model)
    for key, value in gradients(case, inputs).items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


def test_compile_with_inductor() -> None:
    """A training step of a variant with a learned gain, through the real compiler."""
    model = attach(llama(num_hidden_layers=1), ExpressiveConfig(scale="learned"))
    ids = tokens()

    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = taken(model)
    assert any("log_gain" in key for key in expected)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    found = taken(model)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


# ---- causality, padding, packing ------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_no_leak_from_the_future(name: str) -> None:
    model = build(name, "expressive").model
    ids = torch.randint(20, 100, (2, 11))
    changed = ids.clone()
    changed[:, 7:] = torch.randint(100, 190, (2, 4))
    one, other = model(ids).logits, model(changed).logits
    assert torch.equal(one[:, :7], other[:, :7])
    assert not torch.allclose(one[:, 7:], other[:, 7:])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_padded_equals_unpadded(name: str, side: str) -> None:
    model = build(name, "expressive").model
    ids = torch.randint(20, 190, (1, 8))
    alone = model(ids).logits
    filler = torch.full((1, 3), 20)
    padded = torch.cat([filler, ids] if side == "left" else [ids, filler], dim=1)
    other = torch.randint(20, 190, (1, 11))
    mask = torch.ones(2, 11, dtype=torch.long)
    real = slice(3, 11) if side == "left" else slice(0, 8)
    mask[0] = 0
    mask[0, real] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(torch.cat([padded, other]), attention_mask=mask, position_ids=positions).logits
    assert (out[:1, real] - alone).abs().max() < LOGITS
    assert (out[1:] - model(other).logits).abs().max() < LOGITS
    assert out.isfinite().all()


@torch.no_grad()
def test_positions_of_padding_are_no_packed_sequences() -> None:
    """Collators pad positions with 0, which looks as if sequences of one token followed."""
    model = build("llama", "expressive").model
    ids = torch.randint(20, 190, (2, 9))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    positions = (mask.cumsum(-1) - 1) * mask
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & mask[:, None, None].bool()
    dense = torch.zeros(2, 1, 9, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=dense, position_ids=positions).logits
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (found - expected).abs().max() < LOGITS


_SIZES: dict[str, Any] = {
    **SIZES,
    "head_dim": 4,
    "attn_implementation": "expressive",
    "pad_token_id": 0,
}
PACKED: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(llama_config(attn_implementation="expressive")),
    "mistral, sliding": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=3)),
    "gemma2, sliding": lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES, sliding_window=3)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES)),
}


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_separate(name: str, batch: int, use_cache: bool | None) -> None:
    """Sequences in one row, told apart by positions that start again, do not see each other."""
    model = PACKED[name]().eval()
    parts = [tokens(length, batch) for length in (5, 4, 7)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts]).expand(batch, -1)
    options = {} if use_cache is None else {"use_cache": use_cache}
    packed = model(torch.cat(parts, dim=1), position_ids=positions, **options).logits
    separate = torch.cat([model(part).logits for part in parts], dim=1)
    assert (packed - separate).abs().max() < LOGITS


@torch.no_grad()
@pytest.mark.parametrize("name", PACKED)
def test_positions_that_transformers_looked_at_are_not_looked_at_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look has the host wait for the device. Positions that change are looked at anew."""
    looked = []
    find = contract.packed_rows
    monkeypatch.setattr(contract, "packed_rows", lambda x: looked.append(x) or find(x))
    model = PACKED[name]().eval()
    ids, positions = tokens(16, 2), torch.arange(16).expand(2, -1).clone()
    options = {"position_ids": positions, "use_cache": False}
    whole = model(ids, **options).logits
    assert not looked
    assert torch.equal(whole, model(ids, use_cache=False).logits)
    assert not looked
    positions[:, 5:] -= 5
    packed = model(ids, **options).logits
    separate = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], dim=1)
    assert (packed - separate).abs().max() < LOGITS
    assert (packed - whole).abs().max() > 10 * LOGITS
    positions[:, 5:] += 5
    assert torch.equal(model(ids, **options).logits, whole)
    # With a cache Transformers does not look.
    looked.clear()
    model(ids, position_ids=positions, use_cache=True)
    assert looked


@torch.no_grad()
def test_positions_of_stock_models_are_not_remembered() -> None:
    options = {"position_ids": torch.arange(9)[None], "use_cache": False}
    masking.remember_unbroken(None)
    LlamaForCausalLM(llama_config(attn_implementation="eager"))(tokens(9, 1), **options)
    assert masking._unbroken.get() is None
    PACKED["llama"]()(tokens(9, 1), **options)
    assert masking._unbroken.get() is not None


@torch.no_grad()
def test_packed_by_cumulative_lengths() -> None:
    """As data collators for flash attention describe a packed row."""
    model = PACKED["llama"]().eval()
    parts = [tokens(length, 1) for length in (5, 4, 7)]
    lengths = torch.tensor([0, 5, 9, 16], dtype=torch.int32)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = model(
        torch.cat(parts, dim=1),
        position_ids=positions,
        cu_seq_lens_q=lengths,
        cu_seq_lens_k=lengths,
        max_length_q=7,
        max_length_k=7,
    ).logits
    separate = torch.cat([model(part).logits for part in parts], dim=1)
    assert (packed - separate).abs().max() < LOGITS


# ---- the attention function itself ----------------------------------------------------------------


class Attention(nn.Module):
    """As much of an attention module as the attention function looks at."""

    def __init__(self, is_causal: bool | None = None) -> None:
        super().__init__()
        model = attach(llama(), ExpressiveConfig())
        self.mechanism = model.model.layers[0].self_attn.mechanism
        if is_causal is not None:
            self.is_causal = is_causal
        self.eval()


def call(
    module: nn.Module, mask: Tensor | None, queries: int = 7, keys: int = 7, **options: Any
) -> Any:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, queries, 4, generator=generator)
    key, value = (torch.randn(2, 2, keys, 4, generator=generator) for _ in range(2))
    function = AttentionInterface._global_mapping["expressive"]
    return function(module, query, key, value, mask, scaling=0.5, **options)[0]


def witness(visible: Tensor, queries: int = 7, keys: int = 7, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, queries, 4, generator=generator)
    key, value = (torch.randn(2, 2, keys, 4, generator=generator) for _ in range(2))
    function = AttentionInterface._global_mapping[dense.EXPRESSIVE]
    visible = visible.expand(2, 1, queries, keys)
    out: Tensor = function(nn.Module().eval(), query, key, value, visible, scaling=0.5, **options)[
        0
    ]
    return out


def triangle(queries: int, keys: int, diagonal: int = 0) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal)


def test_mask_of_every_kind() -> None:
    """Bool, integer, float and compact masks that say the same give the same."""
    visible = triangle(7, 7)[None, None].repeat(2, 1, 1, 1)
    visible[0, :, :, :2] = False
    expected = witness(visible)
    hidden = ~visible
    additive = torch.zeros(2, 1, 7, 7)
    masks = {
        "bool": visible,
        "int64": visible.long(),
        "int32 per head": visible.int().expand(2, 4, 7, 7),
        "minimum": additive.masked_fill(hidden, torch.finfo(torch.float32).min),
        "-inf": additive.masked_fill(hidden, -torch.inf),
        "-1e4": additive.masked_fill(hidden, -1e4),
        "compact": compact_mask(2, 7, 7, attention_mask=visible[:, 0, -1]),
        "longer than the keys": torch.nn.functional.pad(visible, (0, 3)),
    }
    for kind, mask in masks.items():
        # What the module says about causality is repeated by the mask.
        for is_causal in (None, False, True):
            out = call(Attention(is_causal), mask)
            assert (out - expected).abs().max() < 1e-6, kind


@pytest.mark.parametrize("argument", [None, False, True])
@pytest.mark.parametrize("module", [None, False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 9), (1, 9), (9, 4)])
def test_no_mask(argument: bool | None, module: bool | None, queries: int, keys: int) -> None:
    """Without a mask only the argument counts; more keys are a static cache's tail.

    What the module says is not reliable (cross-attention of many models calls itself causal), and
    eager attention does not read it.
    """
    causal = bool(argument)
    visible = (
        triangle(queries, keys) if causal and queries > 1 else torch.ones(queries, keys).bool()
    )
    options = {} if argument is None else {"is_causal": argument}
    out = call(Attention(module), None, queries, keys, **options)
    assert (out - witness(visible, queries, keys)).abs().max() < 1e-6


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 9)])
def test_window_without_mask(queries: int, keys: int) -> None:
    """A window that no mask states is not ignored."""
    visible = triangle(queries, keys) & ~triangle(queries, keys, -3)
    out = call(Attention(), None, queries, keys, is_causal=True, sliding_window=3)
    assert (out - witness(visible, queries, keys)).abs().max() < 1e-6


def test_keywords() -> None:
    """Everything additive, the sink, the cap and the selections, against the witness."""
    visible = triangle(7, 7)
    position_bias = torch.randn(1, 4, 7, 7)
    cases: list[dict[str, Any]] = [
        {"position_bias": position_bias},
        {"softcap": 0.3},
        {"s_aux": torch.randn(4)},
        {"sinks": torch.randn(2, 4, 7, 1)},
        {"indices": torch.tensor([[[0, 2, -1]] * 7] * 2)},
        {"sliding_window": 2},
        {"use_cache": True, "output_router_logits": False, "input_ids": None},
    ]
    plain = call(Attention(), visible[None, None])
    for options in cases:
        expected = witness(visible, **options)
        for mask in (visible.expand(2, 1, 7, 7), compact_mask(2, 7, 7)):
            out = call(Attention(), mask, **options)
            assert (out - expected).abs().max() < 1e-6, options
        informational = "sliding_window" in options or "use_cache" in options
        assert torch.allclose(out, plain) == informational, options


@pytest.mark.parametrize("name", ["cache", "block_table", "head_mask"])
def test_what_cannot_be_honoured_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*Tensor"):
        call(Attention(), None, **{name: torch.ones(1)})


def test_hybrid_layers_and_heads() -> None:
    """Half softmax, half expressive is exactly that, with everything a call may carry."""
    model: PreTrainedModel = attach(llama(), ExpressiveConfig(softmax_heads=2))
    module = Attention()
    module.mechanism = model.model.layers[0].self_attn.mechanism
    mask = torch.zeros(2, 4, 7, 7).masked_fill(~triangle(7, 7), -torch.inf)
    mask = mask + torch.randn(2, 4, 7, 7)
    options = {"s_aux": torch.randn(4), "softcap": 2.0, "position_bias": torch.randn(1, 4, 7, 7)}
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, 7, 4, generator=generator)
    key, value = (torch.randn(2, 2, 7, 4, generator=generator) for _ in range(2))
    functions = [AttentionInterface._global_mapping[n] for n in (dense.SOFTMAX, dense.EXPRESSIVE)]
    softmax, expressive = (
        function(nn.Module().eval(), query, key, value, mask, scaling=0.5, **options)[0]
        for function in functions
    )
    expected = torch.cat([softmax[:, :, :2], expressive[:, :, 2:]], dim=2)
    assert (call(module, mask, **options) - expected).abs().max() < 1e-6
