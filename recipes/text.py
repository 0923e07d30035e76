"""Text for language models: documents, their bytes or tokens, rows of one length, batches.

Documents follow each other, each with an end token behind it, and are cut into rows of `length`
tokens. Row number and order depend on the options and the seed alone, so that a run goes on with the
row after the last one it has seen, on any number of processes.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import itertools
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from arguments import option, require, require_at_least
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

#: The label of a position that does not count.
IGNORED = -100

#: File kinds with columns; every other file is one document.
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

#: Rows that are put into random order together when text is streamed.
_WINDOW = 1024


@dataclass
class TextOptions:
    _argument_group_name: ClassVar[str] = "the text"

    train_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files or patterns such as 'books/**/*.txt'; .jsonl, .csv and .parquet are "
            "tables of documents, every other file is one document; with neither these nor "
            "--dataset it is the source code of Python's own standard library"
        },
    )
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "files to measure on, for --train_files"}
    )
    dataset: str | None = option(None, "data set of the Hub, or a folder that `datasets` loads")
    dataset_config: str | None = option(None, "its configuration, where it has several")
    dataset_revision: str | None = option(None, "its branch, tag or commit")
    train_split: str = option("train", "its split to train on")
    validation_split: str | None = option(
        None, "its split to measure on; without it documents are set aside"
    )
    text_column: str = option("text", "column of the text, where documents have columns")
    streaming: bool = option(
        False, "read --dataset or tables while training instead of before; for more than fits"
    )
    validation_documents: int = option(
        200, "documents set aside to measure on, where there is no validation data"
    )
    validation_rows: int = option(1024, "rows to measure on, at most")
    tokenizer: str | None = option(
        None, "of the Hub, or a folder; without it every byte is a token, and nothing is loaded"
    )
    length: int = option(512, "tokens in a row")
    documents: Literal["separate", "joined"] = option(
        "separate",
        "what shares a row: separate: no token sees another document; joined: it does, which "
        "attention without a mask is a little faster for",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 2, "length")
        require_at_least(self, 1, "validation_documents", "validation_rows")
        require(
            self.dataset is None or not self.train_files,
            "give either --dataset or --train_files, not both.",
        )
        require(
            bool(self.train_files) or not self.validation_files,
            "--validation_files goes with --train_files; for --dataset there is --validation_split.",
        )
        require(
            not self.streaming or self.dataset is not None or bool(self.train_files),
            "--streaming needs --dataset or --train_files; the standard library is small.",
        )

    @property
    def name(self) -> str:
        """What the text is called in table and card."""
        if self.dataset is not None:
            return self.dataset
        return " ".join(self.train_files) or "source code of Python's standard library"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Token i is the byte i, 256 the end of a document: nothing to train, nothing unknown."""
    # Byte-level tokenizers show a byte as the character of that number where it is printable, the
    # others as the characters from 256 on, in order.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    vocabulary = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


class Text:
    """The documents of the options as tokens.

    Attributes:
        tokenizer: with an end token.
        train, validation: documents, one column `text`; `train` is a stream with --streaming.

    Raises:
        ValueError: no file, no text, a missing split or column, a tokenizer without an end token.
    """

    def __init__(self, options: TextOptions) -> None:
        self.options = options
        self.is_bytes = options.tokenizer is None
        self.tokenizer = (
            byte_tokenizer()
            if options.tokenizer is None
            else AutoTokenizer.from_pretrained(options.tokenizer)
        )
        require(
            self.tokenizer.eos_token_id is not None,
            f"the tokenizer of {options.tokenizer} has no end token to put between documents.",
        )
        self.end = int(self.tokenizer.eos_token_id)
        self.train, self.validation = self._documents()

    # ---- documents -------------------------------------------------------------------------------

    def _documents(self) -> tuple[Any, Dataset]:
        options = self.options
        if options.dataset is None:
            patterns = options.train_files or [f"{sysconfig.get_path('stdlib')}/**/*.py"]
            train = self._files(patterns, skip=not options.train_files)
            given = self._files(options.validation_files) if options.validation_files else None
        else:
            train = self._split(options.train_split, options.streaming)
            given = options.validation_split and self._split(options.validation_split, False)
        if given is not None:
            return train, given
        count = options.validation_documents
        if options.streaming:
            aside = Dataset.from_list(list(train.take(count)), features=_TEXT)
            return train.skip(count), aside
        require(
            len(train) > count,
            f"the text has only {len(train)} documents; --validation_documents {count} sets too "
            "many of them aside.",
        )
        parts = train.train_test_split(count, seed=0)
        return parts["train"], parts["test"]

    def _split(self, split: str, streaming: bool) -> Any:
        options = self.options
        loaded = datasets.load_dataset(
            options.dataset,
            options.dataset_config,
            revision=options.dataset_revision,
            split=split,
            streaming=streaming,
        )
        return self._text_column(loaded)

    def _files(self, patterns: Sequence[str], skip: bool = False) -> Any:
        found = sorted(
            {path for pattern in patterns for path in glob.glob(pattern, recursive=True)}
        )
        paths = [path for path in found if Path(path).is_file()]
        if skip:  # installed packages lie within the standard library's folder
            paths = [path for path in paths if "-packages" not in path]
        require(bool(paths), f"no file matches {' '.join(patterns)}.")
        kinds = {_TABLES.get(Path(path).suffix.lower()) for path in paths}
        require(
            len(kinds) == 1,
            f"{' '.join(patterns)} match files of different kinds; give tables and plain text in "
            "runs of their own.",
        )
        (kind,) = kinds
        if kind is not None:
            streaming = self.options.streaming
            return self._text_column(
                datasets.load_dataset(kind, data_files=paths, split="train", streaming=streaming)
            )
        require(
            not self.options.streaming, "--streaming reads tables and data sets, not plain text."
        )
        texts = (Path(path).read_bytes().decode("utf-8", errors="replace") for path in paths)
        # A copy in two packages would be trained on and measured on.
        return Dataset.from_dict({"text": list(dict.fromkeys(filter(None, texts)))}, features=_TEXT)

    def _text_column(self, documents: Any) -> Any:
        column, names = self.options.text_column, documents.column_names
        require(
            names is None or column in names,
            f"the text has no column {column}; it has {', '.join(names or [])}.",
        )
        documents = documents.select_columns([column])
        return documents if column == "text" else documents.rename_column(column, "text")

    def fingerprint(self) -> str:
        """A sentence that tells local text from other text under the same name."""
        if self.options.dataset is not None or self.options.streaming:
            return ""
        digest, size = hashlib.sha256(), 0
        for part in (self.train, self.validation):
            for document in part["text"]:
                digest.update(content := document.encode())
                size += len(content)
        count = len(self.train) + len(self.validation)
        return f" {count} documents of {size} bytes together, SHA-256 {digest.hexdigest()}."

    # ---- rows ------------------------------------------------------------------------------------

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """The tokens of documents one after the other, each with the end token behind it."""
        if self.is_bytes:
            parts = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        else:
            parts = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        end = np.array([self.end], np.int32)
        return np.concatenate([piece for part in parts for piece in (part, end)]).astype(np.int32)

    def rows(self, documents: Dataset, limit: int | None = None) -> Dataset:
        """Rows of `length` tokens, in a column `input_ids`.

        A thousand documents are cut at a time; what is left over after their last row is dropped.
        """
        length = self.options.length

        def cut(batch: Mapping[str, Any]) -> dict[str, Any]:
            tokens = self.tokens(batch["text"])
            count = len(tokens) // length
            return {"input_ids": tokens[: count * length].reshape(count, length)}

        features = Features({"input_ids": List(Value("int32"), length=length)})
        rows = documents.map(
            cut, batched=True, remove_columns=documents.column_names, features=features, desc="rows"
        )
        require(
            len(rows) > 0, f"the text is shorter than one row of {length} tokens; lower --length."
        )
        return rows if limit is None else rows.select(range(min(limit, len(rows))))

    def collate(self, rows: Any) -> dict[str, Tensor]:
        """A batch from rows of tokens: `input_ids`, `labels`, and `position_ids` where it matters."""
        ids = torch.as_tensor(np.stack(rows), dtype=torch.int64)
        if self.options.documents == "joined":
            return {"input_ids": ids, "labels": ids}
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, :-1] == self.end
        index = torch.arange(ids.shape[1]).expand_as(ids)
        first = torch.where(starts, index, 0).cummax(dim=1).values
        # The first token of a document is not predicted: the text before it says nothing of it.
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(starts, IGNORED),
            "position_ids": index - first,
        }

    def order(self, batch_size: int, seed: int, batches: int) -> ShuffledBatches | PackedStream:
        """The rows of a run of so many batches; `seek` makes it begin later."""
        if self.options.streaming:
            return PackedStream(self, seed)
        return ShuffledBatches(self.rows(self.train), batch_size, seed, batches)

    def training_loader(
        self, order: ShuffledBatches | PackedStream, batch_size: int
    ) -> DataLoader[Any]:
        # A generator of its own, since starting an iterator draws from it, and a resumed run starts
        # one more. The noise of the model must not notice.
        common: dict[str, Any] = {"collate_fn": self.collate, "generator": torch.Generator()}
        if isinstance(order, PackedStream):
            return DataLoader(order, batch_size=batch_size, **common)
        return DataLoader(_Rows(order.rows), batch_sampler=order, **common)

    def validation_loader(self, batch_size: int) -> DataLoader[Any]:
        rows = _Rows(self.rows(self.validation, self.options.validation_rows))
        return DataLoader(
            rows, batch_size=batch_size, collate_fn=self.collate, generator=torch.Generator()
        )


_TEXT = Features({"text": Value("string")})


class _Rows(torch.utils.data.Dataset[NDArray[np.int32]]):
    """A batch of rows by one look into the table."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows.with_format("numpy")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> NDArray[np.int32]:
        return self.rows[indices]["input_ids"]


class ShuffledBatches(Sampler[list[int]]):
    """Batches of row numbers: through all rows in random order before one comes again, and so on.

    The order is a function of `seed` and of the number of rows; batch number k is known without
    those before it.
    """

    drop_last = False

    def __init__(self, rows: Dataset, batch_size: int, seed: int, batches: int) -> None:
        self.rows, self.batch_size, self.seed, self.batches = rows, batch_size, seed, batches
        self.first = 0

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[int]]:
        count, epoch, order = len(self.rows), -1, np.empty(0, np.int64)
        for batch in range(self.first, self.batches):
            chosen = []
            for row in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if row // count != epoch:
                    epoch = row // count
                    order = np.random.default_rng((self.seed, epoch)).permutation(count)
                chosen.append(int(order[row % count]))
            yield chosen

    def state(self, row: int) -> dict[str, Any]:
        return {"row": row}

    def seek(self, state: Mapping[str, Any]) -> None:
        """Begins with the row of a state."""
        self.first = state["row"] // self.batch_size


class PackedStream(IterableDataset[NDArray[np.int32]]):
    """Rows of a stream of documents, tokenised on the way, without end.

    A window of rows at a time is put into random order. Where the stream stood at the beginning of a
    window is remembered, so that a run goes on by reading one window again.
    """

    def __init__(self, text: Text, seed: int) -> None:
        self.text, self.seed = text, seed
        #: What to begin with, and the beginnings of the windows since.
        self.begin: dict[str, Any] = {"window": 0, "epoch": 0, "documents": None, "left": []}
        self.skip = 0
        self.windows: list[dict[str, Any]] = []

    def state(self, row: int) -> dict[str, Any]:
        """Where the stream stood before the window of a row."""
        self.windows = [begin for begin in self.windows if begin["window"] >= row // _WINDOW]
        return {"row": row, "begin": self.windows[0] if self.windows else None}

    def seek(self, state: Mapping[str, Any]) -> None:
        """Begins with the row of a state."""
        if state["begin"] is not None:
            self.begin = state["begin"]
            self.skip = state["row"] - self.begin["window"] * _WINDOW

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        window, epoch, skip = self.begin["window"], self.begin["epoch"], self.skip
        tokens = np.array(self.begin["left"], np.int32)
        length, wanted = self.text.options.length, _WINDOW * self.text.options.length
        documents = self._documents(epoch, self.begin["documents"])
        texts = iter(documents)
        read = 0
        while True:
            self.windows.append(
                {
                    "window": window,
                    "epoch": epoch,
                    "documents": copy.deepcopy(documents.state_dict()),
                    "left": tokens.tolist(),
                }
            )
            parts, have = [tokens], len(tokens)
            while have < wanted:
                batch = [document["text"] for document in itertools.islice(texts, 16)]
                read += len(batch)
                if batch:
                    parts.append(self.text.tokens(batch))
                    have += len(parts[-1])
                    continue
                require(read > 0, "the stream has no documents.")
                epoch, read = epoch + 1, 0
                documents = self._documents(epoch, None)
                texts = iter(documents)
            tokens = np.concatenate(parts)
            rows, tokens = tokens[:wanted].reshape(-1, length), tokens[wanted:]
            order = np.random.default_rng((self.seed, window)).permutation(_WINDOW)
            yield from rows[order[skip:]]
            window, skip = window + 1, 0

    def _documents(self, epoch: int, state: dict[str, Any] | None) -> Any:
        documents = copy.deepcopy(self.text.train)
        documents.set_epoch(epoch)
        if state is not None:
            documents.load_state_dict(state)
        return documents
