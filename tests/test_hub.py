"""Publishing and loading with the real client of the Hub, against a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import TOKEN, HubStandIn, out_of_order
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from tiny import llama, logits, train_gains
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import hub as transformers_hub

from hf_expressive import ExpressiveConfig, attach, cli, push
from hf_expressive.checkpoint import check_weight_files

# The client's own way of sending a large file over plain LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A Hub of one test's own, an empty cache and the right token."""
    with HubStandIn() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The stand-in speaks the LFS protocol; the client takes it where Xet is switched off.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The client waits longer after each failed attempt.
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        yield stand_in
    assert not stand_in.unknown, "the client asked for pages that the stand-in does not have"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The numbers below 32 are the tokens of the same number."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def variant(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A variant with learned gains of its own; another seed, other weights."""
    model = attach(llama(), ExpressiveConfig(scale="learned", **options))
    train_gains(model)
    with torch.no_grad():
        model.lm_head.weight.add_(seed)
    return model


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Bit for bit: every tensor, and what comes out."""
    first, second = one.state_dict(), other.state_dict()
    return (
        list(first) == list(second)
        and all(torch.equal(first[name], second[name]) for name in first)
        and torch.equal(logits(one), logits(other))
    )


# ---- publishing -----------------------------------------------------------------------------------


def test_push_and_reload(hub: HubStandIn) -> None:
    """With the name alone the same model comes back, and the card says what it is."""
    model = variant(power=2.0)
    done = push(model, "llama-expressive", license="mit", language="en")
    assert done.repo_id == "me/llama-expressive"
    assert done.commit.oid == hub.repositories["me/llama-expressive"].branches["main"]
    assert any("base_model" in said for said in done.left_out)
    assert "The card does not know: base_model" in str(done)
    files = hub.files("me/llama-expressive")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    written = json.loads(files["config.json"])
    assert written["architectures"] == ["HfExpressiveLlamaForCausalLM"]
    assert written["hf_expressive"]["power"] == 2.0
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert 'AutoModelForCausalLM.from_pretrained("me/llama-expressive")' in card.text
    assert same(AutoModelForCausalLM.from_pretrained("me/llama-expressive"), model)


def test_push_to_hub(hub: HubStandIn, caplog: pytest.LogCaptureFixture) -> None:
    """Transformers' own method publishes a card of ours; an author's card is kept, and tagged."""
    model = variant()
    commit = model.push_to_hub("me/small", private=True, tags=["mine"])
    assert hub.repositories["me/small"].private
    assert commit.oid in hub.repositories["me/small"].trees
    card = ModelCard(hub.files("me/small")["README.md"].decode())
    assert {"hf_expressive", "expressive-attention", "mine"} <= set(card.data.tags)
    assert "expressive attention takes the place of softmax" in card.text
    hub.put(
        "me/small", {"README.md": b"---\nlicense: mit\ntags:\n- theirs\n---\n\nWritten by hand.\n"}
    )
    model.push_to_hub("me/small", commit_message="again")
    card = ModelCard(hub.files("me/small")["README.md"].decode())
    assert card.text.strip() == "Written by hand."
    assert card.data.license == "mit"
    assert card.data.tags == ["theirs", "hf_expressive", "expressive-attention"]


def test_save_and_push(hub: HubStandIn, tmp_path: Path) -> None:
    """`save_pretrained(…, push_to_hub=True)`: folder and repository hold the same checkpoint."""
    model = variant()
    model.save_pretrained(tmp_path / "small", push_to_hub=True)
    published = hub.files("me/small")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "small" / name).read_bytes() == published[name]
    assert b"expressive attention takes the place" in published["README.md"]


def test_stock_models_are_pushed_as_ever(hub: HubStandIn) -> None:
    llama().push_to_hub("me/stock")
    assert b"expressive" not in hub.files("me/stock")["README.md"]


def test_tokenizer_goes_with_the_model(hub: HubStandIn, tokenizer: PreTrainedTokenizerFast) -> None:
    push(variant(), "me/small", processor=tokenizer)
    assert AutoTokenizer.from_pretrained("me/small")("3 1 4")["input_ids"] == [3, 1, 4]


def test_branch_and_pinned_revisions(hub: HubStandIn) -> None:
    """Each revision gives its own model, whatever the branches point to later."""
    models = [variant(seed) for seed in range(3)]
    first = push(models[0], "me/small").commit.oid
    second = push(models[1], "me/small").commit.oid
    push(models[2], "me/small", revision="trial")
    for revision, model in [(first, models[0]), (second, models[1]), ("trial", models[2])]:
        assert same(AutoModelForCausalLM.from_pretrained("me/small", revision=revision), model)
    assert same(AutoModelForCausalLM.from_pretrained("me/small"), models[1])


@pytest.mark.parametrize("sizes", [("4KB", "50GB"), ("50GB", "4KB"), ("4KB", "8KB")], ids=str)
def test_weights_of_the_last_push_are_the_only_ones(
    hub: HubStandIn, sizes: tuple[str, str]
) -> None:
    """One file over shards and the other way: the loader would find the old ones as well."""
    push(variant(1), "me/small", max_shard_size=sizes[0])
    other = "onnx/model.safetensors"
    hub.put("me/small", {other: b"not ours", "notes.md": b"mine"})
    model = variant(2)
    push(model, "me/small", max_shard_size=sizes[1])
    assert same(AutoModelForCausalLM.from_pretrained("me/small"), model)
    files = hub.files("me/small")
    assert files[other] == b"not ours"
    assert files["notes.md"] == b"mine"
    weights = {name for name in files if name.endswith(".safetensors") and "/" not in name}
    if "model.safetensors.index.json" in files:
        index = json.loads(files["model.safetensors.index.json"])
        assert weights == set(index["weight_map"].values())
        assert len(weights) > 1
    else:
        assert weights == {"model.safetensors"}


def test_what_does_not_fit_is_refused_before_anything_is_sent(hub: HubStandIn) -> None:
    for wrong in (
        {"results": {"runs": []}},
        {"base_model_relation": "cousin"},
        {"card": ModelCard("x"), "license": "mit"},
    ):
        with pytest.raises(ValueError, match=r"results lacks|base_model_relation|push got card="):
            push(variant(), "me/small", **wrong)
    with pytest.raises(ValueError, match="a card is for a model with one of the mechanisms"):
        push(llama(), "me/small")
    assert not hub.requests


# ---- loading --------------------------------------------------------------------------------------


def test_loading_options(hub: HubStandIn, tmp_path: Path) -> None:
    """Shards, a subfolder, a dtype, a device map, the cache without a connection."""
    model = variant()
    push(model, "me/small", max_shard_size="4KB")
    hub.put("me/nested", {f"deep/{name}": data for name, data in hub.files("me/small").items()})
    load = AutoModelForCausalLM.from_pretrained
    assert same(load("me/nested", subfolder="deep"), model)
    assert same(load("me/small", device_map="auto"), model)
    assert same(load("me/small", dtype=torch.bfloat16), model.to(torch.bfloat16))
    with out_of_order(hub, status=503):
        assert same(load("me/small", dtype=torch.bfloat16, local_files_only=True), model)


class Hostile:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_pickled_weights_are_never_read(where: str, hub: HubStandIn, tmp_path: Path) -> None:
    model = variant()
    push(model, "me/small")
    files = hub.files("me/small")
    del files["model.safetensors"]
    torch.save({"weight": Hostile(tmp_path / "ran")}, tmp_path / "pickled.bin")
    files["pytorch_model.bin"] = (tmp_path / "pickled.bin").read_bytes()
    hub.put("me/pickled", files)
    name = "me/pickled"
    if where == "folder":
        name = str(tmp_path / "checkpoint")
        os.mkdir(name)
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not safetensors"):
        AutoModelForCausalLM.from_pretrained(name)
    assert not (tmp_path / "ran").exists()


def test_overriding_warns_once(hub: HubStandIn) -> None:
    push(attach(llama(), ExpressiveConfig()), "me/small")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoModelForCausalLM.from_pretrained("me/small", attn_implementation="sdpa")
    ours = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(ours) == 1
    assert "another model now" in ours[0]


# ---- what goes wrong ------------------------------------------------------------------------------


def test_upload_broken_half_way(hub: HubStandIn) -> None:
    """What is published stays as it was, and loads; the same call again finishes the job."""
    before, after = variant(1), variant(2)
    push(before, "me/small")
    published = hub.repositories["me/small"].branches["main"]
    with (
        out_of_order(hub, uploads_left=1),
        pytest.raises(RuntimeError, match="Error while uploading") as failure,
    ):
        push(after, "me/small", max_shard_size="4KB")
    assert any("is unchanged; the same call goes on" in note for note in failure.value.__notes__)
    assert hub.repositories["me/small"].branches["main"] == published
    assert same(AutoModelForCausalLM.from_pretrained("me/small"), before)
    push(after, "me/small", max_shard_size="4KB")
    assert same(AutoModelForCausalLM.from_pretrained("me/small"), after)


def test_retry_sends_only_what_is_missing(hub: HubStandIn) -> None:
    model = variant()
    with (
        out_of_order(hub, uploads_left=2),
        pytest.raises(RuntimeError, match="Error while uploading") as failure,
    ):
        push(model, "me/small", max_shard_size="4KB")
    assert failure.value.__notes__
    arrived = list(hub.uploaded)
    push(model, "me/small", max_shard_size="4KB")
    assert arrived
    assert len(hub.uploaded) == len(set(hub.uploaded)), "a file was sent twice"
    assert same(AutoModelForCausalLM.from_pretrained("me/small"), model)


def test_wrong_token(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid username or password") as refused:
        push(variant(), "me/small")
    assert refused.value.response.status_code == 401
    assert "nothing was published on me/small" in refused.value.__notes__[0]
    assert not hub.repositories


def test_wrong_token_on_the_command_line(
    hub: HubStandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variant().save_pretrained(tmp_path / "variant")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert cli.main(["push", str(tmp_path / "variant"), "me/small"]) == 2
    error = capsys.readouterr().err
    assert "hf-expressive push: error: " in error
    assert "Invalid username or password" in error
    assert "nothing was published on me/small" in error
    assert "Traceback" not in error


def test_truncated_download(hub: HubStandIn, tmp_path: Path) -> None:
    """The connection ends early: an error, nothing under the final name, and the next load is right."""
    model = variant()
    push(model, "me/small")
    with (
        out_of_order(hub, cut_download=2000),
        pytest.raises(OSError, match="Consistency check failed"),
    ):
        AutoModelForCausalLM.from_pretrained("me/small")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert same(AutoModelForCausalLM.from_pretrained("me/small"), model)


def test_tampered_download(hub: HubStandIn, tmp_path: Path) -> None:
    """One bit differs, the size does not: the client takes it, we do not."""
    model = variant()
    push(model, "me/small", max_shard_size="4KB")
    with (
        out_of_order(hub, tamper=True),
        pytest.raises(OSError, match=r"the SHA-256 of .* the Hub says"),
    ):
        AutoModelForCausalLM.from_pretrained("me/small")
    assert same(AutoModelForCausalLM.from_pretrained("me/small"), model)


def test_files_that_were_there_before_are_checked_on_demand(
    hub: HubStandIn, tmp_path: Path
) -> None:
    """Hashing at every load would cost as much as loading."""
    push(variant(), "me/small")
    AutoModelForCausalLM.from_pretrained("me/small")
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    blob = file.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    os.utime(blob, (0, 0))
    check_weight_files([file])
    with pytest.raises(OSError, match="removed from the cache"):
        check_weight_files([file], whole_cache=True)
    assert not file.exists()
    assert not blob.exists()


def test_verify_hashes_what_the_cache_holds(hub: HubStandIn, tmp_path: Path) -> None:
    push(variant(), "me/small")
    assert cli.main(["verify", "me/small"]) == 0
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    os.utime(file.resolve(), (0, 0))
    assert cli.main(["verify", "me/small"]) == 2
    assert cli.main(["verify", "me/small"]) == 0


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_truncated_shard_in_a_folder(keep: float, tmp_path: Path) -> None:
    """The header of a safetensors file tells how long it has to be."""
    variant().save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(OSError, match=rf"{shard.name} is incomplete or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


_FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from hf_expressive import ExpressiveConfig, attach
    from tiny import llama
    from transformers import AutoModelForCausalLM
    model = attach(llama(), ExpressiveConfig(power=3.0))
    # From here on the file system takes no file larger than this.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    tries = {
        "save": lambda: model.save_pretrained(sys.argv[1]),
        "load": lambda: AutoModelForCausalLM.from_pretrained("me/small"),
    }
    for name, run in tries.items():
        try:
            run()
        except Exception as error:
            print(name, type(error).__name__, error)
        else:
            sys.exit(f"{name}: it was written")
"""


def test_full_disk(hub: HubStandIn, tmp_path: Path) -> None:
    """The operating system refuses to write, on saving and on downloading.

    The earlier checkpoint is as it was, byte for byte, and no download has its final name.
    """
    path, cache = tmp_path / "checkpoint", tmp_path / "small cache"
    push(variant(), "me/small")
    variant().save_pretrained(path)
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    helpers = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FULL_DISK), str(path)],
        env={
            **os.environ,
            "PYTHONPATH": helpers,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved, loaded = (line for line in done.stdout.splitlines() if "File too large" in line)
    assert saved.startswith("save ")
    assert loaded.startswith("load ")
    assert list(cache.rglob("config.json"))
    assert not list(cache.rglob("*.safetensors"))
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before


def test_full_disk_while_pushing(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is written before anything goes out."""
    before = variant(1)
    push(before, "me/small")
    full = lambda *_, **__: Path("/dev/full").write_text("x" * 9999)  # noqa: E731
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device") as failure:
        push(variant(2), "me/small")
    assert "is unchanged" in failure.value.__notes__[0]
    assert len(hub.repositories["me/small"].trees) == 2  # .gitattributes, and the first push
