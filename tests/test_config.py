"""Options: what is refused, what survives the round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, CLIPConfig, LlamaConfig

import hf_expressive
from hf_expressive import ExpressiveConfig
from hf_expressive.config import CONFIG_CLASSES, SECTION, MechanismConfig, read_section

NAN, INFINITY = float("nan"), float("inf")

BAD_OPTIONS: list[tuple[str, Any]] = [
    *(("scale", bad) for bad in (0, -1.0, NAN, INFINITY, True, None, "", "modul", [1.0], 10**400)),
    *(("power", bad) for bad in (0, -1, NAN, INFINITY, True, None, "1", [1], 10**400)),
    *(("softmax_layers", bad) for bad in (None, 1, "01", [-1], [0, 0], [0.0], [True], ["0"], {0})),
    *(("softmax_heads", bad) for bad in (None, -1, 1.0, True, "1", [1], NAN)),
]


@pytest.mark.parametrize(("name", "bad"), BAD_OPTIONS, ids=lambda value: str(value)[:20])
def test_bad_value(name: str, bad: Any) -> None:
    """A bad value raises ValueError that names the option, in Python and in a section."""
    with pytest.raises(ValueError, match=name):
        ExpressiveConfig(**{name: bad})
    with pytest.raises(ValueError, match=name):
        read_section({"mechanism": "expressive", name: bad})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mechanism": "expressive", "sclae": 1.0}, "sclae.*known options.*scale"),
        ({"mechanism": "expressive", "kernel": "rbf"}, "kernel"),
        (
            {"mechanism": "expressive", "gain": 0.3},
            "gain=0.3 has no meaning without scale='learned'",
        ),
        ({"mechanism": "expressive", "scale": "learned", "gain": 0}, "gain must be a positive"),
        ({"mechanism": "expressive", "sink": 1}, "sink must be true or false, got 1"),
        ({"mechanism": "expresive"}, "mechanism.*expresive"),
        ({"mechanism": None}, "mechanism"),
        ({"mechanism": ["expressive"]}, "mechanism"),
        ({}, "mechanism"),
        ([], "list"),
        ("expressive", "str"),
        (True, "bool"),
        ({"mechanism": "expressive", "version": "1000.0.0"}, "1000.0.0.*newer.*pip install"),
        ({"mechanism": "unheard of", "version": "1000.0.0"}, "newer"),
        ({"mechanism": "expressive", "version": "one"}, "version"),
        ({"mechanism": "expressive", "version": 1}, "version"),
        ({"mechanism": "expressive", "version": ""}, "version"),
        ({"mechanism": "expressive", "version": "-1.0"}, "version"),
    ],
)
def test_bad_section(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_section(section)
    # The same through a Transformers config, which then is not made.
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**{SECTION: section})
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({"model_type": "llama", SECTION: section})


def test_newer_minor_version_is_read() -> None:
    major = hf_expressive.__version__.split(".")[0]
    assert read_section({"mechanism": "expressive", "version": f"{major}.999.0"})


VALID = [
    ExpressiveConfig(),
    ExpressiveConfig(scale=1, power=2),
    ExpressiveConfig(scale="learned", power=0.5, softmax_layers=(2, 0), softmax_heads=4),
    ExpressiveConfig(scale="learned", gain=0.3, sink=True),
    ExpressiveConfig(scale=0.1, softmax_layers=[]),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("options", VALID, ids=str)
def test_round_trip(options: ExpressiveConfig) -> None:
    section = json.loads(json.dumps(options.to_dict()))
    assert section["mechanism"] == "expressive"
    assert section["version"] == hf_expressive.__version__
    assert read_section(section) == options
    # And through the config of a model, its own round trip included.
    config = LlamaConfig(**{SECTION: options})
    again = LlamaConfig.from_dict(json.loads(config.to_json_string()))
    assert read_section(getattr(again, SECTION)) == options
    assert again._attn_implementation == "expressive"
    assert read_section(getattr(config, SECTION)) == options


def test_normalised_and_frozen() -> None:
    options = ExpressiveConfig(scale=1, power=2, softmax_layers=[3, 1])  # type: ignore[arg-type]
    assert options.softmax_layers == (1, 3)
    assert isinstance(options.scale, float)
    assert isinstance(options.power, float)
    assert hash(options) == hash(ExpressiveConfig(scale=1.0, power=2.0, softmax_layers=(1, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.power = 3.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        ExpressiveConfig("learned")  # type: ignore[misc]


def test_defaults_are_the_papers() -> None:
    assert dataclasses.asdict(ExpressiveConfig()) == {
        "scale": "module",
        "power": 1.0,
        "gain": 1.0,
        "sink": False,
        "softmax_layers": (),
        "softmax_heads": 0,
    }


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
_NAMES = st.sampled_from(
    ["mechanism", "version", "scale", "power", "gain", "sink", "softmax_layers", "softmax_heads"]
) | st.text(max_size=5)
_LIKELY = (
    st.sampled_from(["expressive", "module", "learned", "0.1.0", 1, 2.5, 10**400, 1e-320, [0, 1]])
    | _JSON
)


@settings(max_examples=400, deadline=None, database=None)
@given(st.dictionaries(_NAMES, _LIKELY, max_size=6) | _JSON)
def test_any_section_is_read_or_refused(section: Any) -> None:
    """Whatever stands in config.json: a ValueError, or valid options that survive a round trip."""
    if isinstance(section, dict):
        section = {"mechanism": "expressive", **section}
    try:
        options = read_section(section)
    except ValueError:
        return
    assert isinstance(options, MechanismConfig)
    assert read_section(json.loads(json.dumps(options.to_dict()))) == options


# ---- in the configs of Transformers ---------------------------------------------------------------


def test_section_reaches_sub_configs() -> None:
    config = CLIPConfig(**{SECTION: ExpressiveConfig(power=2.0)})
    for part in (config, config.text_config, config.vision_config):
        assert getattr(part, SECTION)["power"] == 2.0
        assert part._attn_implementation == "expressive"


def test_setting_none_removes_the_section() -> None:
    config = BertConfig(**{SECTION: {"mechanism": "expressive", "power": 2}})
    setattr(config, SECTION, None)
    assert getattr(config, SECTION) is None
    # What is written tells the options all the same: the defaults.
    assert read_section(config.to_dict()[SECTION]) == ExpressiveConfig()


def test_bad_section_leaves_the_old_one() -> None:
    config = BertConfig(**{SECTION: ExpressiveConfig(power=2.0)})
    with pytest.raises(ValueError, match="power"):
        setattr(config, SECTION, {"mechanism": "expressive", "power": -1})
    assert getattr(config, SECTION)["power"] == 2.0


def test_config_without_mechanism_is_untouched() -> None:
    """A stock config is written as Transformers writes it."""
    written = LlamaConfig(attn_implementation="sdpa").to_dict()
    assert SECTION not in written
    assert "attn_implementation" not in written


def test_implementation_is_not_overridden_by_the_section() -> None:
    config = LlamaConfig(attn_implementation="sdpa", **{SECTION: ExpressiveConfig()})
    assert config._attn_implementation == "sdpa"


def test_config_module_imports_no_torch() -> None:
    """Reading options is cheap: `config` needs neither torch nor Transformers."""
    source = __import__(f"{hf_expressive.__name__}.config", fromlist=["config"]).__file__
    code = f"import runpy, sys; runpy.run_path({source!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_mechanism_has_a_config_class() -> None:
    assert CONFIG_CLASSES["expressive"] is ExpressiveConfig
    for name, cls in CONFIG_CLASSES.items():
        assert cls.mechanism == name
        assert read_section({"mechanism": name}) == cls()
