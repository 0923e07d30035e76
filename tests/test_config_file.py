"""A `config.json` of a variant that was changed: refused with a sentence, or the variant it says."""

from __future__ import annotations

import copy
import json
import math
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import llama, llava
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_expressive import ExpressiveConfig, ImplicitKernelConfig, attach
from hf_expressive.checkpoint import check_config_file
from hf_expressive.config import SECTION, read_section

HUGE = 10**400
HOSTILE = [
    "__import__('os').system('touch ran')",
    "!!python/object/apply:os.system ['touch ran']",
    "${jndi:ldap://localhost/x}",
    "{{ 7 * 7 }}",
    "$(touch ran)",
    "'; DROP TABLE models; --",
    "../../../../etc/passwd",
    "someone/kernel:function",
    "paged|expressive",
    "expressive\0",
    "expressive ",
    "Expressive",
    "\x1b[31mexpressive\x1b[0m",
    "\u202eevisserpxe",
    "еxpressive",  # the first letter is Cyrillic
    "%s%s%n",
    "x" * 1_000_000,
    "\n" * 1000,
    "",
]
WRONG_TYPES: list[Any] = [None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}]
WRONG_NUMBERS: list[Any] = [-1, -0.5, 0, HUGE, -HUGE, 1e308 * 10, -math.inf, math.nan]

#: Values that no option of a mechanism takes, each with those that it does take left out.
ANYTHING = [*HOSTILE, *WRONG_TYPES, *WRONG_NUMBERS]
TAKEN: dict[str, list[Any]] = {
    "softmax_layers": [[]],
    "softmax_heads": [0],
    "epsilon": [0],
    "norm_dropout": [0],
    "kl_weight": [0],
    "copula_weight": [0],
    "seed": [0],
    "authors_code": [True, False],
    "cache_features": [True, False],
    "sink": [True, False],
    "version": [None],
}
OPTIONS = {
    "expressive": ExpressiveConfig(scale=0.7, power=2.0).to_dict(),
    "implicit_kernel": ImplicitKernelConfig(kernel="copula", num_features=2).to_dict(),
}


def is_taken(name: str, value: Any) -> bool:
    return any(type(value) is type(taken) and value == taken for taken in TAKEN.get(name, ()))


BAD_SECTIONS: list[tuple[str, Any]] = [
    *((mechanism, {**options, name: value})
      for mechanism, options in OPTIONS.items()
      for name in options
      for value in ANYTHING
      if not is_taken(name, value)),
    *(("expressive", {**OPTIONS["expressive"], name: 1}) for name in HOSTILE),
    *(("expressive", {**OPTIONS["expressive"], "softmax_layers": [bad]}) for bad in (HUGE, -1, 7)),
    *(("expressive", whole) for whole in [*HOSTILE, *WRONG_TYPES, 0, HUGE, [OPTIONS["expressive"]]]),
    ("expressive", OPTIONS["implicit_kernel"]),
    ("implicit_kernel", OPTIONS["expressive"]),
]  # fmt: skip

#: Flags beside a section that describes expressive attention.
BAD_FLAGS: list[Any] = [
    *(text for text in HOSTILE if text != "expressive"),
    *WRONG_TYPES,
    *WRONG_NUMBERS,
    "sdpa",
    "eager",
    "flex_attention",
    "flash_attention_2",
    "kernels-community/flash-attn2",
    "implicit_kernel",
    ["expressive"],
    {"": "sdpa"},
    {"": ["expressive"]},
    {"text_config": {"": "eager"}},
    {"expressive": "sdpa"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variant")
    attach(llama(), ExpressiveConfig(scale=0.7, power=2.0)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def written(checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return loaded


def refusal(checkpoint: Path, content: dict[str, Any]) -> str:
    """What is said when this `config.json` is loaded; fails if nothing is said."""
    (checkpoint / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\w") as refused:
        AutoModelForCausalLM.from_pretrained(checkpoint)
    message = str(refused.value)
    assert len(message) < 1000
    controls = [sign for sign in message if unicodedata.category(sign) in ("Cc", "Cf")]
    assert not controls, f"control characters reach the terminal: {controls}"
    assert not list(checkpoint.glob("ran")), "it ran"
    return message


def test_every_bad_section_is_refused(checkpoint: Path, written: dict[str, Any]) -> None:
    assert len(BAD_SECTIONS) > 500
    for mechanism, section in BAD_SECTIONS:
        content = {**written, "attn_implementation": mechanism, SECTION: section}
        message = refusal(checkpoint, content)
        assert SECTION in message or "softmax_layers contains" in message, (section, message)


def test_every_bad_flag_is_refused(checkpoint: Path, written: dict[str, Any]) -> None:
    for flag in BAD_FLAGS:
        message = refusal(checkpoint, {**written, "attn_implementation": flag})
        assert "attn_implementation" in message, (flag, message)


@pytest.mark.parametrize("hidden", ["_attn_implementation", "_attn_implementation_internal"])
def test_no_other_key_selects_an_attention(
    hidden: str, checkpoint: Path, written: dict[str, Any]
) -> None:
    assert hidden in refusal(checkpoint, {**written, hidden: "sdpa"})


@pytest.mark.parametrize(
    "gone", [["attn_implementation"], [SECTION], ["attn_implementation", SECTION]], ids=str
)
def test_missing_parts_are_refused(
    gone: list[str], checkpoint: Path, written: dict[str, Any]
) -> None:
    """The name in `architectures` tells that there was something."""
    content = {key: value for key, value in written.items() if key not in gone}
    assert "changed after it was saved" in refusal(checkpoint, content)


@pytest.mark.parametrize(
    "names", [["HfExpressiveLlamaForCausalLM", 1], ["HfExpressiveLlamaForCausalLM", None]]
)
def test_bad_names(names: list[Any], checkpoint: Path, written: dict[str, Any]) -> None:
    message = refusal(checkpoint, {**written, "architectures": names})
    assert "architectures must list names" in message


def test_sections_of_parts_are_read_too(tmp_path: Path) -> None:
    model = llava()
    attach(model.model.language_model, ExpressiveConfig(power=2.0))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for change in (
        {SECTION: {**content["text_config"][SECTION], "power": -1}},
        {SECTION: None},
        {"_attn_implementation": "sdpa"},
    ):
        changed = copy.deepcopy(content)
        changed["text_config"].update(change)
        (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ValueError, match=f"{SECTION}|_attn_implementation"):
            AutoModelForImageTextToText.from_pretrained(tmp_path)
    del content["text_config"][SECTION]
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="asks for expressive, but no section"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_files_of_others_are_left_alone(checkpoint: Path, written: dict[str, Any]) -> None:
    """No trace of this package: none of our business, however odd."""
    for odd in (None, [], "x", 3, ["LlamaForCausalLM"], [None]):
        check_config_file({"architectures": odd, "attn_implementation": ["odd"], "x": {"y": {}}})
    by_hand = {**written, "architectures": ["LlamaForCausalLM"]}
    del by_hand["attn_implementation"]
    (checkpoint / "config.json").write_text(json.dumps(by_hand), encoding="utf-8")
    assert AutoConfig.from_pretrained(checkpoint)._attn_implementation == "expressive"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
_LIKELY = st.sampled_from(
    [
        "expressive",
        "implicit_kernel",
        "sdpa",
        "eager",
        "module",
        "learned",
        "rbf",
        "0.1.0",
        1,
        2,
        0.5,
        [1],
    ]
)
_SECTIONS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        [*OPTIONS["expressive"], "kernel", "p", "norm_dropout", "unknown"], _LIKELY | _JSON
    ),
).map(lambda section: {"mechanism": "expressive", **section})
_FLAGS = (
    _LIKELY | _JSON | st.dictionaries(st.sampled_from(["", "text_config"]), _LIKELY, max_size=2)
)


@settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(section=_SECTIONS | _JSON, flag=st.just("expressive") | _FLAGS)
def test_what_loads_is_what_the_file_says(
    section: Any, flag: Any, checkpoint: Path, written: dict[str, Any]
) -> None:
    """Any section with any flag: refused, or loaded with this mechanism and these options."""
    content = {**written, "attn_implementation": flag, SECTION: section}
    (checkpoint / "config.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
    except ValueError:
        return
    options = read_section(section)
    assert model.config._attn_implementation == options.mechanism
    assert read_section(getattr(model.config, SECTION)) == options
