"""Checkpoints: what is written, what comes back, and what happens when something goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import llama, llama_config, llava, llava_inputs, logits, tokens, train_gains
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    modeling_utils,
)
from transformers.models.auto import auto_factory

import hf_expressive
from hf_expressive import ExpressiveConfig, attach, detach
from hf_expressive.attention.base import Mechanism
from hf_expressive.config import SECTION

LEARNED = ExpressiveConfig(scale="learned", power=2.0, softmax_layers=(1,))


def variant(**options: Any) -> LlamaForCausalLM:
    """A trained variant: every learned gain has a value of its own."""
    model = attach(llama(), ExpressiveConfig(scale="learned", **options))
    train_gains(model)
    return model


def gains(model: PreTrainedModel) -> list[Tensor]:
    return [value for name, value in model.named_parameters() if "log_gain" in name]


def config_file(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def plain_checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    llama().save_pretrained(path)
    return path


def run(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, with the tests' helpers importable."""
    helpers = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": helpers, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


# ---- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"power": 2.0}, {"softmax_layers": (0,)}, {"softmax_heads": 2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """With only the path the same model comes back, bit for bit."""
    model = variant(**options).to(dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "expressive"
    assert getattr(again.config, SECTION) == getattr(model.config, SECTION)
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(logits(again), logits(model))


def test_round_trip_again(tmp_path: Path) -> None:
    """The second copy of a copy is the first."""
    variant().save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    names = [sorted(p.name for p in (tmp_path / copy).iterdir()) for copy in ("one", "two")]
    assert names[0] == names[1]
    for name in names[0]:
        one, two = ((tmp_path / copy / name).read_bytes() for copy in ("one", "two"))
        assert one == two, name


def test_sharded_round_trip(tmp_path: Path) -> None:
    model = variant()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map(device_map: str, tmp_path: Path) -> None:
    model = variant()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(again), logits(model))


def test_config_file_describes_the_variant(tmp_path: Path) -> None:
    """The flag that plain Transformers refuses, and the options with the package's version."""
    attach(llama(), LEARNED).save_pretrained(tmp_path)
    written = config_file(tmp_path)
    assert written["attn_implementation"] == "expressive"
    assert written[SECTION] == {
        "mechanism": "expressive",
        "version": hf_expressive.__version__,
        "softmax_layers": [1],
        "softmax_heads": 0,
        "scale": "learned",
        "power": 2.0,
        "gain": 1.0,
        "sink": False,
    }


def test_architectures_are_names_of_ours(tmp_path: Path) -> None:
    """On disk a name that no other program can look up; loaded by Transformers, its own again."""
    model = variant()
    model.save_pretrained(tmp_path)
    assert config_file(tmp_path)["architectures"] == ["HfExpressiveLlamaForCausalLM"]
    assert not hasattr(transformers, "HfExpressiveLlamaForCausalLM")
    # Engines read the config alone, perhaps in a process that has imported this package.
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["HfExpressiveLlamaForCausalLM"]
    for loader in (AutoModelForCausalLM, LlamaForCausalLM):
        again = loader.from_pretrained(tmp_path)
        assert again.config.architectures == ["LlamaForCausalLM"]
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path)
        assert config_file(tmp_path)["architectures"] == ["HfExpressiveLlamaForCausalLM"]
    detach(again).save_pretrained(tmp_path)
    assert config_file(tmp_path)["architectures"] == ["LlamaForCausalLM"]


def test_pipeline(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = variant()
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    generate = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generate.model) is LlamaForCausalLM
    assert torch.equal(logits(generate.model), logits(model))
    (found,) = generate("3 1 4", max_new_tokens=3, do_sample=False, return_tensors=True)
    assert len(found["generated_token_ids"]) == 6


def test_auto_classes_choose_among_several_by_the_stock_name() -> None:
    """Where a config fits several classes, the entry decides, and Transformers knows its own names."""
    config = llama_config(architectures=["HfExpressiveLlamaForCausalLM"])
    candidates = {type(config): (LlamaModel, LlamaForCausalLM)}
    assert auto_factory._get_model_class(config, candidates) is LlamaForCausalLM
    assert config.architectures == ["HfExpressiveLlamaForCausalLM"]


def test_checkpoint_with_stock_names_loads(tmp_path: Path) -> None:
    """As version 0.1.0 wrote them before there were names of ours."""
    model = variant()
    model.save_pretrained(tmp_path)
    written = config_file(tmp_path)
    written["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("how", ["argument", "set"])
def test_defaults_are_written_too(how: str, plain_checkpoint: Path, tmp_path: Path) -> None:
    """A variant made by name alone says what it is, so that other defaults cannot change it."""
    name = {"attn_implementation": "expressive"} if how == "argument" else {}
    model = AutoModelForCausalLM.from_pretrained(plain_checkpoint, **name)
    if how == "set":
        model.set_attn_implementation("expressive")
    model.save_pretrained(tmp_path)
    written = config_file(tmp_path)
    assert written["attn_implementation"] == "expressive"
    assert written[SECTION]["mechanism"] == "expressive"
    assert written[SECTION]["version"] == hf_expressive.__version__


def test_detached_model_is_a_stock_model(tmp_path: Path) -> None:
    model = detach(variant())
    model.save_pretrained(tmp_path)
    written = config_file(tmp_path)
    assert SECTION not in written
    assert "attn_implementation" not in written
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama()))


def test_switched_off_stays_off(tmp_path: Path) -> None:
    """A variant set to sdpa and saved does not come back as expressive in silence."""
    model = attach(llama(), ExpressiveConfig())
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


# ---- learned parameters ---------------------------------------------------------------------------


def test_created_on_construction() -> None:
    model = LlamaForCausalLM(llama_config(**{SECTION: LEARNED}))
    assert model.config._attn_implementation == "expressive"
    assert [gain.shape for gain in gains(model)] == [(4,)]  # layer 1 is softmax
    assert (gains(model)[0] == 0).all()


def test_created_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(**{SECTION: LEARNED}))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(gains(model)) == 1
    model.to_empty(device="cpu")
    for gain in gains(model):
        gain.data.fill_(torch.nan)
    model.init_weights()
    assert all((gain == 0).all() for gain in gains(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.usefixtures("poisoned")
def test_initialised_where_the_checkpoint_lacks_it(
    plain_checkpoint: Path, dtype: torch.dtype, device_map: str | None
) -> None:
    """Exactly 0, a gain of 1, where uninitialised memory is NaN; the loaded rest untouched."""
    model = AutoModelForCausalLM.from_pretrained(
        plain_checkpoint,
        dtype=dtype,
        device_map=device_map,
        **{SECTION: ExpressiveConfig(scale="learned")},
    )
    assert len(gains(model)) == 2
    for gain in gains(model):
        assert gain.dtype == dtype
        assert (gain == 0).all()
    for name, value in llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(dtype)), name
    expected = attach(llama().to(dtype), ExpressiveConfig())
    torch.testing.assert_close(logits(model), logits(expected))


def test_partly_missing(tmp_path: Path) -> None:
    """One layer's gain in the checkpoint, the other's not: kept, and initialised."""
    from safetensors.torch import load_file, save_file

    model = variant()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    missing = next(name for name in state if "layers.0" in name and "log_gain" in name)
    state.pop(missing)
    save_file(state, file, metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (gains(again)[0] == 0).all()
    assert torch.equal(gains(again)[1], gains(model)[1])


def test_from_config() -> None:
    model = AutoModelForCausalLM.from_config(
        llama_config(), attn_implementation="expressive", **{SECTION: LEARNED}
    )
    assert len(gains(model)) == 1
    assert getattr(model.config, SECTION)["power"] == 2.0


def test_stock_models_are_left_alone(plain_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain_checkpoint)
    assert not any(isinstance(module, Mechanism) for module in model.modules())
    assert list(model.state_dict()) == list(llama().state_dict())


# ---- parts of a composite model -------------------------------------------------------------------

PARTS = {"": "sdpa", "text_config": "expressive", "vision_config": "sdpa"}


def _parts(model: PreTrainedModel) -> dict[str, str]:
    config = model.config
    return {
        "": config._attn_implementation,
        "text_config": config.text_config._attn_implementation,
        "vision_config": config.vision_config._attn_implementation,
    }


def test_dict_round_trip(tmp_path: Path) -> None:
    """Text expressive, vision sdpa, by the dict that Transformers takes."""
    llava().save_pretrained(tmp_path / "plain")
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "plain", attn_implementation=PARTS
    )
    assert _parts(model) == PARTS
    model.save_pretrained(tmp_path / "variant")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant")
    assert _parts(again) == PARTS
    stock = logits(llava(), **llava_inputs())
    assert (logits(model, **llava_inputs()) - stock).abs().max() > 1e-3
    assert torch.equal(logits(again, **llava_inputs()), logits(model, **llava_inputs()))


def test_attached_part_round_trip(tmp_path: Path) -> None:
    model = llava()
    attach(model.model.language_model, ExpressiveConfig(scale="learned"))
    train_gains(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert _parts(again) == _parts(model)
    assert len(gains(again)) == 2
    assert torch.equal(logits(again, **llava_inputs()), logits(model, **llava_inputs()))


def test_parts_with_options_of_their_own(tmp_path: Path) -> None:
    model = llava()
    attach(model.model.language_model, ExpressiveConfig(power=2.0))
    attach(model.model.vision_tower, ExpressiveConfig(scale=1.0, softmax_layers=(2,)))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert _parts(again) == _parts(model)
    for part in ("text_config", "vision_config"):
        one, other = (getattr(getattr(m.config, part), SECTION) for m in (model, again))
        assert one == other, part
    assert config_file(tmp_path)["architectures"] == ["HfExpressiveLlavaForConditionalGeneration"]
    assert torch.equal(logits(again, **llava_inputs()), logits(model, **llava_inputs()))


def test_whole_composite_round_trip(tmp_path: Path) -> None:
    model = attach(llava(), ExpressiveConfig(scale="learned"))
    train_gains(model)
    model.save_pretrained(tmp_path)
    assert config_file(tmp_path)["attn_implementation"] == "expressive"
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert len(gains(again)) == 5
    assert torch.equal(logits(again, **llava_inputs()), logits(model, **llava_inputs()))


# ---- never softmax in silence ---------------------------------------------------------------------

_PLAIN = """
    import sys
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    auto = AutoModelForImageTextToText if sys.argv[2] == "llava" else AutoModelForCausalLM
    auto.from_pretrained(sys.argv[1])
    assert "hf_expressive" not in sys.modules
"""


@pytest.mark.parametrize("kind", ["whole", "options only", "llava"])
def test_plain_transformers_refuses(kind: str, tmp_path: Path) -> None:
    """Without the package the checkpoint does not load; a detached one does."""
    if kind == "llava":
        model: Any = llava()
        attach(model.model.language_model, ExpressiveConfig())
    else:
        model = (
            variant()
            if kind == "whole"
            else attach(llava() if kind == "llava" else llama(), ExpressiveConfig())
        )
    model.save_pretrained(tmp_path)
    done = run(_PLAIN, tmp_path, kind, check=False)
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert "expressive" in done.stderr
    if kind == "whole":
        detach(model).save_pretrained(tmp_path)
        run(_PLAIN, tmp_path, kind)


@pytest.mark.parametrize("how", ["from_pretrained", "from_config"])
def test_attention_of_another_program_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A serving engine puts its own attention in: no user asked for another model, so no warning."""
    attach(llama(), ExpressiveConfig()).save_pretrained(tmp_path)
    monkeypatch.setitem(AttentionInterface._global_mapping, "engine", lambda *_, **__: None)
    config = AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = "engine"
    load = {
        "from_pretrained": lambda: LlamaForCausalLM.from_pretrained(tmp_path, config=config),
        "from_config": lambda: AutoModelForCausalLM.from_config(config),
    }
    with pytest.raises(ValueError, match='"engine" would compute another function'):
        load[how]()


def test_overriding_warns_once(tmp_path: Path) -> None:
    attach(llama(), ExpressiveConfig()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="another model") as caught:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert len(caught) == 1
    assert '"expressive"' in str(caught[0].message)
    assert '"sdpa"' in str(caught[0].message)
    assert torch.equal(logits(model), logits(llama()))


def test_loading_does_not_warn(tmp_path: Path) -> None:
    variant().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_mechanism_in_the_section_is_refused(tmp_path: Path) -> None:
    """A section that describes something else than the flag."""
    variant().save_pretrained(tmp_path)
    written = config_file(tmp_path)
    written[SECTION]["mechanism"] = "unheard of"
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(ValueError, match="unheard of"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_newer_major_version_is_refused(tmp_path: Path) -> None:
    variant().save_pretrained(tmp_path)
    written = config_file(tmp_path)
    written[SECTION]["version"] = "1000.0.0"
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(ValueError, match="newer"):
        AutoConfig.from_pretrained(tmp_path)


# ---- interrupted ----------------------------------------------------------------------------------


def _leftovers(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir() if entry != path]


@pytest.mark.parametrize("call", [0, 1, 3])
def test_interrupted_writing_leaves_the_earlier_checkpoint(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights' writer fails at a shard: the target is byte for byte what it was."""
    path = tmp_path / "checkpoint"
    variant(power=3.0).save_pretrained(path)
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    count = iter(range(100))
    original = modeling_utils.safe_save_file

    def failing(*args: Any, **kwargs: Any) -> None:
        if next(count) == call:
            raise OSError("no space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", failing)
    with pytest.raises(OSError, match="no space"):
        variant().save_pretrained(path, max_shard_size="4KB")
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before
    assert not _leftovers(path)


def _replacing(stop_at: int) -> Iterator[Callable[..., None]]:
    count = iter(range(1000))
    original = os.replace

    def replace(*args: Any, **kwargs: Any) -> None:
        if next(count) == stop_at:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    yield replace


@pytest.mark.parametrize("old", ["one file", "shards"])
@pytest.mark.parametrize("new", ["one file", "shards"])
def test_interrupted_renaming_leaves_one_checkpoint(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any rename, what loads is the earlier or the later model, not a mixture."""
    sizes = {"one file": {}, "shards": {"max_shard_size": "4KB"}}
    earlier, later = variant(), variant()
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(0.1)
    candidates = [logits(earlier), logits(later)]
    for stop_at in range(30):
        path = tmp_path / f"checkpoint{stop_at}"
        earlier.save_pretrained(path, **sizes[old])
        with monkeypatch.context() as patch:
            (replace,) = _replacing(stop_at)
            patch.setattr(os, "replace", replace)
            try:
                later.save_pretrained(path, **sizes[new])
            except KeyboardInterrupt:
                finished = False
            else:
                finished = True
        loaded = logits(AutoModelForCausalLM.from_pretrained(path))
        assert any(torch.equal(loaded, candidate) for candidate in candidates), stop_at
        if finished:
            assert torch.equal(loaded, candidates[1])
            assert stop_at > 1
            break
        shutil.rmtree(path)
    else:
        pytest.fail("saving never came to an end")


_KILLED = """
    import os, signal, sys
    from transformers import modeling_utils
    from hf_expressive import ExpressiveConfig, attach
    from tiny import llama

    original = modeling_utils.safe_save_file
    def killed(*args, **kwargs):
        original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    modeling_utils.safe_save_file = killed
    attach(llama(), ExpressiveConfig(power=3.0)).save_pretrained(sys.argv[1])
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    model = variant()
    model.save_pretrained(path)
    done = run(_KILLED, path, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_parent_folder_may_be_read_only(tmp_path: Path) -> None:
    """A checkpoint folder that is a mount point of its own: nothing can be written beside it."""
    path = tmp_path / "outer" / "checkpoint"
    path.mkdir(parents=True)
    path.parent.chmod(0o500)
    try:
        variant().save_pretrained(path)
    finally:
        path.parent.chmod(0o700)
    assert (path / "config.json").exists()


def test_nothing_is_written_across_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renames stay within the target's own folder, which may be a mount point."""
    path = tmp_path / "checkpoint"
    moves: list[tuple[Path, Path]] = []
    original = os.replace

    def replace(source: Any, target: Any, **kwargs: Any) -> None:
        moves.append((Path(source).resolve(), Path(target).resolve()))
        original(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", replace)
    variant().save_pretrained(path)
    assert moves
    assert all(path.resolve() in source.parents for source, _ in moves)


def test_saving_replaces_stale_shards(tmp_path: Path) -> None:
    """Fewer, then more shards: nothing of the earlier checkpoint is left to be loaded."""
    earlier, later = variant(), variant(power=3.0)
    earlier.save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    later.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    earlier.save_pretrained(tmp_path, max_shard_size="4KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(earlier))


# ---- training tools -------------------------------------------------------------------------------


def test_peft(tmp_path: Path) -> None:
    """LoRA on every linear layer: the gain is not adapted, survives merging and saving."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = variant()
    trained = [gain.detach().clone() for gain in gains(model)]
    stock = logits(model)
    adapted = get_peft_model(
        model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    )
    assert not any("lora" in name and "mechanism" in name for name, _ in adapted.named_parameters())
    different = logits(adapted)
    assert (different - stock).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), different)
    assert all(torch.equal(a, b) for a, b in zip(gains(merged), trained, strict=True))
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))
    loaded = PeftModel.from_pretrained(variant(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), different)


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = tokens(batch=8)[index]
        return {"input_ids": row, "labels": row}


def test_trainer(tmp_path: Path) -> None:
    """A few steps: the gain moves, the checkpoint loads as it is, training resumes."""
    arguments = {
        "output_dir": str(tmp_path),
        "learning_rate": 0.1,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    model = attach(llama(), ExpressiveConfig(scale="learned"))
    Trainer(model, TrainingArguments(max_steps=2, **arguments), train_dataset=_Rows()).train()
    assert all((gain != 0).any() for gain in gains(model))
    checkpoint = tmp_path / "checkpoint-2"
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(logits(again), logits(model.eval()))
    trainer = Trainer(again, TrainingArguments(max_steps=3, **arguments), train_dataset=_Rows())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3


_DISTRIBUTED = """
    import os, sys
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from hf_expressive import ExpressiveConfig, attach
    from tiny import llama, tokens, train_gains

    rank = int(sys.argv[1])
    store = dist.FileStore(sys.argv[2], 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = attach(llama(), ExpressiveConfig(scale="learned"))
    train_gains(model)
    ids = tokens(batch=4)

    def gradients(model, ids, full=lambda g: g):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n.removeprefix("module."): full(p.grad).clone() for n, p in model.named_parameters()}

    alone = gradients(model, ids)
    mine = ids[2 * rank : 2 * rank + 2]
    together = gradients(torch.nn.parallel.DistributedDataParallel(model), mine)
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-4)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = gradients(model, mine, lambda g: g.full_tensor())
    assert any("log_gain" in name for name in sharded)
    for name, gradient in alone.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=1e-3, atol=1e-4)
    dist.destroy_process_group()
"""


def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    """Two processes: the gradients are those of one process with the whole batch."""
    helpers = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": helpers, "OMP_NUM_THREADS": "1"}
    code = textwrap.dedent(_DISTRIBUTED)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], (
        errors[0][-3000:] + errors[1][-3000:]
    )
