"""The command line: `hf-expressive COMMAND …`, each command one public function.

Exit codes: 0 done; 1 `verify` found a fault; 2 wrong usage, or something could not be read, written or
published: the reason is on the standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from . import __version__
from .cards import RELATIONS, left_out, render_card
from .checkpoint import check_weight_files
from .config import CONFIG_CLASSES, SECTION
from .explain import explain
from .hub import Saveable, class_of, load, push
from .kernel_repository import KERNEL_VERSION, write_kernel_repository
from .patcher import attach, configs_of
from .verify import VerificationError, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        code: int = given.run(given)
    except (ValueError, OSError, SafetensorError) as error:
        lines = [str(error) or type(error).__name__, *getattr(error, "__notes__", ())]
        print(f"hf-expressive {given.command}: error: " + "\n".join(lines), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-expressive {given.command}: interrupted", file=sys.stderr)
        return 130
    return code


# ---- commands -------------------------------------------------------------------------------------


def _info(given: argparse.Namespace) -> int:
    config = AutoConfig.from_pretrained(given.checkpoint, **_place(given))
    with torch.device("meta"):  # the modules without their weights
        model = class_of(config)(config)
    sections = [section for part in configs_of(config) if (section := getattr(part, SECTION))]
    saved_by = f", saved by {SECTION} {sections[0]['version']}" if sections else ""
    print(f"{given.checkpoint}: {model.num_parameters():,} parameters{saved_by}")
    print(explain(model))
    return 0


def _verify(given: argparse.Namespace) -> int:
    model = _load(given)
    if not Path(given.checkpoint).is_dir():
        cached = snapshot_download(given.checkpoint, revision=given.revision, local_files_only=True)
        files = sorted(Path(cached, given.subfolder).glob("*.safetensors"))
        check_weight_files(files, whole_cache=True)
    try:
        print(verify(model))
    except VerificationError as error:
        print(error)
        return 1
    return 0


def _convert(given: argparse.Namespace) -> int:
    target = Path(given.output)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder.")
    options = {}
    for text in given.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option must be NAME=VALUE, got {text!r}.")
        options[name] = _value(value)
    model = _load(given)
    attach(model, CONFIG_CLASSES[given.mechanism].from_options(options))
    model.save_pretrained(target)
    processor = _processor(given)
    if processor is not None:
        processor.save_pretrained(str(target))
    print(explain(model))
    print(
        f"{target}: written. The weights are those of {given.checkpoint}, which another attention was "
        "trained with: train them before they are of use, for example with recipes/convert.py."
    )
    return 0


def _card(given: argparse.Namespace) -> int:
    results = json.loads(Path(given.results).read_text(encoding="utf-8"))
    model = load(given.model) if given.model else None
    card = render_card(model, results=results, **_about(given))
    if given.output is None:
        print(card)
    else:
        path = Path(given.output)
        if path.is_dir():
            path /= f"{card.data['model_name']}.md"
        card.save(path)
        print(f"{path}: written")
    _tell_left_out(left_out(card))
    return 0


def _push(given: argparse.Namespace) -> int:
    results = given.results and json.loads(Path(given.results).read_text(encoding="utf-8"))
    publication = push(
        _load(given),
        given.repo_id,
        results=results,
        processor=_processor(given),
        private=given.private,
        revision=given.branch,
        create_pr=given.create_pr,
        commit_message=given.commit_message,
        max_shard_size=given.max_shard_size,
        **_about(given),
    )
    print(publication.commit.pr_url or publication.commit.commit_url)
    _tell_left_out(publication.left_out)
    return 0


def _kernel(given: argparse.Namespace) -> int:
    path = write_kernel_repository(Path(given.folder))
    upload = f"hf upload OWNER/NAME {path} . --repo-type kernel --revision v{KERNEL_VERSION}"
    print(f"{path}: written. Publish it: {upload}")
    return 0


# ---- arguments ------------------------------------------------------------------------------------


def _load(given: argparse.Namespace) -> PreTrainedModel:
    return load(given.checkpoint, dtype=given.dtype, device_map=given.device_map, **_place(given))


def _processor(given: argparse.Namespace) -> Saveable | None:
    """Tokenizer or processor of a checkpoint, if it has one."""
    try:
        processor: Saveable = AutoProcessor.from_pretrained(given.checkpoint, **_place(given))
    except (OSError, ValueError):
        return None
    return processor


def _place(given: argparse.Namespace) -> dict[str, Any]:
    return {"revision": given.revision, "subfolder": given.subfolder}


def _value(text: str) -> Any:
    """A value of an option: JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _about(given: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say for the card."""
    names = ("variant", "seed", "name", "model_id", "base_model", "base_model_relation")
    told = {
        name: getattr(given, name, None)
        for name in (*names, "datasets", "language", "license", "tags")
    }
    return {name: value for name, value in told.items() if value is not None}


def _tell_left_out(missing: Sequence[str]) -> None:
    if missing:
        print(f"not known, so not in the card: {'; '.join(missing)}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """Commands and arguments; `run` of what it parses is the function of the command."""
    top = argparse.ArgumentParser(
        prog="hf-expressive", description="Variants of Transformers models with other attention."
    )
    top.add_argument("--version", action="version", version=f"hf_expressive {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(run=run)
        return added

    info = command(
        "info", _info, "tell what a checkpoint runs, layer by layer, without its weights"
    )
    _add_place(info)

    check = command(
        "verify", _verify, "load a checkpoint and prove that its attention does as it should"
    )
    _add_checkpoint(check)

    convert = command(
        "convert", _convert, "put a mechanism onto a checkpoint and save it, untrained"
    )
    _add_checkpoint(convert)
    convert.add_argument(
        "output", metavar="FOLDER", help="where to write the variant; new or empty"
    )
    convert.add_argument(
        "--mechanism",
        choices=sorted(CONFIG_CLASSES),
        default="expressive",
        help="default: expressive",
    )
    convert.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the mechanism, e.g. power=2 or softmax_layers=[0,1]; may be repeated",
    )

    card = command("card", _card, "render a model card from a results record")
    card.add_argument("results", metavar="RESULTS.json", help="record that a recipe has written")
    card.add_argument(
        "--output", metavar="PATH", help="file, or folder for NAME.md; default: standard output"
    )
    card.add_argument(
        "--model",
        metavar="CHECKPOINT",
        help="the model; without it the record tells all, see its card",
    )
    card.add_argument("--model-id", help="what the card's example loads; default: its own folder")
    _add_about(card)

    publish = command("push", _push, "publish a checkpoint on the Hub, with a model card")
    _add_checkpoint(publish)
    publish.add_argument(
        "repo_id", metavar="OWNER/NAME", help="repository, made where it is missing"
    )
    publish.add_argument(
        "--results", metavar="RESULTS.json", help="record of the training, for the card"
    )
    publish.add_argument(
        "--private", action="store_true", default=None, help="if it has to be made"
    )
    publish.add_argument("--branch", help="branch to publish on; default: the main one")
    publish.add_argument("--create-pr", action="store_true", help="propose the change only")
    publish.add_argument("--commit-message", help="default: Upload and the model's class")
    publish.add_argument("--max-shard-size", default="5GB", help="of one file; default: 5GB")
    _add_about(publish)

    kernel = command("kernel", _kernel, "write the kernels as a repository for the kernels library")
    kernel.add_argument("folder", metavar="FOLDER", help="where to; new or empty")
    return top


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, or name on the Hub")
    parser.add_argument("--revision", default="main", help="branch, tag or commit; default: main")
    parser.add_argument("--subfolder", default="", help="folder within it")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    _add_place(parser)
    parser.add_argument("--dtype", default="auto", help="e.g. float32; default: as it was saved")
    parser.add_argument("--device-map", help="e.g. auto or cuda; default: the CPU")


def _add_about(parser: argparse.ArgumentParser) -> None:
    about = parser.add_argument_group("for the card; what is not told is left out")
    about.add_argument("--variant", help="of the record, where several have the model's attention")
    about.add_argument("--seed", type=int, help="of the run that the model is")
    about.add_argument("--name", help="title")
    about.add_argument("--base-model", nargs="+", help="what it was made from, on the Hub")
    about.add_argument("--base-model-relation", choices=RELATIONS, help="how it was made from that")
    about.add_argument("--datasets", nargs="+", help="what it was trained on, on the Hub")
    about.add_argument("--language", nargs="+", help="ISO 639 codes")
    about.add_argument("--license", help="identifier on the Hub, e.g. apache-2.0")
    about.add_argument("--tags", nargs="+", help="further tags")


if __name__ == "__main__":
    sys.exit(main())
