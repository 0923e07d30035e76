"""Variants on the Hub: one commit with weights, options, tokenizer and model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .cards import left_out, render_card
from .checkpoint import stock_names
from .config import package_version, shown

__all__ = ["Publication", "Saveable", "class_of", "left_out", "load", "push", "render_card"]

logger = logging.get_logger(__name__)

#: Weights of a model at the top of a repository, of whatever format and number of shards.
_WEIGHTS = re.compile(r"(pytorch_)?model([.-][^/]*)?\.(safetensors|bin)(\.index\.json)?")


class Saveable(Protocol):
    """A tokenizer or processor."""

    def save_pretrained(self, save_directory: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Publication:
    """What `push` has published; prints as a sentence.

    Attributes:
        repo_id: with the owner's name.
        commit: as the client of the Hub reports it.
        left_out: what the card does not say because it is not known.
    """

    repo_id: str
    commit: CommitInfo
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.repo_id}: {self.commit.pr_url or self.commit.commit_url}"
        if self.left_out:
            text += f"\nThe card does not know: {'; '.join(self.left_out)}."
        return text


def load(checkpoint: str | Path, **options: Any) -> PreTrainedModel:
    """Loads a checkpoint as the class that it was saved from.

    Args:
        checkpoint: folder, or name on the Hub.
        options: of `from_pretrained`: `revision`, `subfolder`, `dtype`, `device_map`, ….

    Raises:
        ValueError: its `config.json` does not name a class of the installed Transformers.
    """
    names = {"revision", "subfolder", "token", "cache_dir", "local_files_only"}
    where = {name: value for name, value in options.items() if name in names}
    model_class = class_of(AutoConfig.from_pretrained(checkpoint, **where))
    return model_class.from_pretrained(checkpoint, **options)


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of Transformers that the `architectures` of a config name.

    Raises:
        ValueError: they name none of the installed version.
    """
    names = stock_names(config.architectures or [])
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"architectures in config.json is {shown(config.architectures)}, no model class of "
            f"Transformers {transformers.__version__}."
        )
    return found


def push(
    model: PreTrainedModel,
    repo_id: str,
    *,
    results: Mapping[str, Any] | None = None,
    processor: Saveable | None = None,
    card: ModelCard | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    max_shard_size: int | str = "50GB",
    **about: Any,
) -> Publication:
    """Publishes a variant on the Hub: weights, options and model card in one commit.

    The repository is made where it is missing. What is published changes in one step, by a commit that
    also removes weights which the new ones replace; a push that fails on the way leaves it as it was,
    and the same call again uploads only what is not there yet.

    Args:
        model: a model with a mechanism of this package.
        repo_id: `"owner/name"`, or a name in one's own account.
        results: the record of the training, see `render_card`.
        processor: tokenizer or processor to publish beside the model.
        card: a card to publish in place of the rendered one.
        private: whether a new repository is private. Default: as its owner has set.
        token: of the Hub. Default: the stored one.
        revision: branch to publish on, made where it is missing. Default: the main one.
        create_pr: propose the change instead of making it.
        commit_message, commit_description: of the commit.
        max_shard_size: largest size of one weight file.
        **about: what `render_card` takes besides: `seed`, `base_model`, `datasets`, `license`, ….

    Returns:
        What was published, and what its card does not know.

    Raises:
        ValueError: the model has no mechanism, or `results` does not fit it; nothing has been sent.
        HfHubHTTPError: the Hub refuses, for example the token.
        OSError: no connection, or no space to write the checkpoint to.
    """
    if card is not None and (about or results is not None):
        given = [*about, *(["results"] if results is not None else [])]
        raise ValueError(f"push got card= and {', '.join(given)}; what a card says is in the card.")

    def make_card(name: str) -> ModelCard:
        return card or render_card(model, results=results, **{"model_id": name, **about})

    def save(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(str(folder))

    make_card(repo_id)  # what does not fit shows before anything is sent
    target = _Target.made(repo_id, token=token, private=private, revision=revision)
    return _publish(
        target,
        make_card(target.repo_id),
        save,
        commit_message=commit_message or f"Upload {type(model).__name__}",
        commit_description=commit_description,
        create_pr=create_pr,
    )


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    save: Callable[[Path], None] | None = None,
) -> CommitInfo:
    """`model.push_to_hub` of a variant: a card that is published already is kept, and gets our tags.

    Args:
        save: writes the checkpoint into a folder. Default: `model.save_pretrained`.
        See Transformers' `push_to_hub` for the others.

    Returns:
        The commit.
    """
    tags = [*(model.model_tags or ()), *(tags or ())]
    render_card(model)  # refuses what cannot be published, before anything is sent
    target = _Target.made(repo_id, token=token, private=private, revision=revision)
    rendered = render_card(model, model_id=target.repo_id, tags=tags)
    card = target.card() or rendered
    card.data["tags"] = list(
        dict.fromkeys([*(card.data.get("tags") or ()), *rendered.data["tags"]])
    )
    published = _publish(
        target,
        card,
        save or (lambda folder: model.save_pretrained(folder, max_shard_size=max_shard_size)),
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        create_pr=create_pr,
    )
    if published.left_out:
        logger.warning(str(published))
    return published.commit


@dataclass(frozen=True, slots=True)
class _Target:
    """A repository that exists, and the branch to publish on."""

    api: HfApi
    repo_id: str
    revision: str | None

    @classmethod
    def made(
        cls, repo_id: str, *, token: bool | str | None, private: bool | None, revision: str | None
    ) -> Self:
        """The repository and its branch, made where they are missing."""
        api = HfApi(token=token, library_name="hf_expressive", library_version=package_version())
        with _explained(f"nothing was published on {repo_id}"):
            full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr/"):
                api.create_branch(full, branch=revision, exist_ok=True)
        return cls(api, full, revision)

    def card(self) -> ModelCard | None:
        """The card that is published there."""
        try:
            path = self.api.hf_hub_download(self.repo_id, "README.md", revision=self.revision)
        except RemoteEntryNotFoundError:
            return None
        return ModelCard.load(path)


def _publish(
    target: _Target, card: ModelCard, save: Callable[[Path], None], **commit: Any
) -> Publication:
    with (
        _explained(f"what is published on {target.repo_id} is unchanged; the same call goes on"),
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        save(folder)
        card.save(folder / "README.md")
        new = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        published = target.api.list_repo_files(target.repo_id, revision=target.revision)
        stale = [name for name in published if _WEIGHTS.fullmatch(name) and name not in new]
        # One commit, not `upload_folder`, which may make several. Two sets of weights must never lie
        # side by side: a loader picks either.
        done = target.api.create_commit(
            target.repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in new.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            revision=target.revision,
            **commit,
        )
    return Publication(target.repo_id, done, tuple(left_out(card)))


@contextmanager
def _explained(consequence: str) -> Iterator[None]:
    """Adds to an error what it means for the repository."""
    try:
        yield
    except Exception as error:
        error.add_note(f"hf_expressive.push: {consequence}.")
        raise
