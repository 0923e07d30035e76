"""Text to convert a model on: sentences that every Python installation carries, or the user's own."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from arguments import option, require, require_at_least
from datasets import Dataset, DatasetDict, load_dataset

#: Value of `--text` for the documentation strings of Python's standard library.
DOCSTRINGS = "docstrings"

_LOADERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json"}
# Full stop, question or exclamation mark before a space and a capital letter.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORDS = range(5, 41)


@dataclass
class TextOptions:
    _argument_group_name: ClassVar[str] = "the text"

    text: str = option(
        DOCSTRINGS,
        "what to convert on: docstrings (sentences of Python's standard library), a .txt, .csv or "
        ".json(l) file with a text a line, or a data set of the Hub",
    )
    text_config: str | None = option(None, "configuration of a data set of the Hub")
    text_column: str = option("text", "its column")
    validation_share: float = option(0.1, "share of the text that is only measured on")
    validation_texts: int = option(256, "of which at most so many are used")
    max_length: int = option(64, "tokens of a text, or of a block of text for language models")

    def __post_init__(self) -> None:
        require_at_least(self, 2, "max_length", "validation_texts")
        require(
            0 < self.validation_share < 1,
            f"--validation_share must be between 0 and 1, got {self.validation_share}.",
        )

    @property
    def name(self) -> str:
        """What the text is called in table and card."""
        if self.text == DOCSTRINGS:
            return "docstrings of Python's standard library"
        return Path(self.text).name if Path(self.text).suffix in _LOADERS else self.text


def read_texts(options: TextOptions) -> DatasetDict:
    """Splits `train` and `validation` with the column `text`; the same ones at every call.

    Raises:
        ValueError: a missing file or column, or too little text for two splits.
    """
    if options.text == DOCSTRINGS:
        # No module is in both splits: its sentences resemble each other.
        rows = Dataset.from_list([{"module": m, "text": s} for m, s in docstring_sentences()])
        modules = rows.unique("module")
        cut = Dataset.from_dict({"module": modules}).train_test_split(
            options.validation_share, seed=0
        )
        held_out = set(cut["test"]["module"])
        inside = [module in held_out for module in rows["module"]]
        parts = {
            "train": rows.select([i for i, held in enumerate(inside) if not held]),
            "validation": rows.select([i for i, held in enumerate(inside) if held]),
        }
    else:
        loader = _LOADERS.get(Path(options.text).suffix.lower())
        if loader is None:
            rows = load_dataset(options.text, options.text_config, split="train")
        else:
            require(Path(options.text).is_file(), f"--text {options.text} is no file.")
            rows = load_dataset(loader, data_files=options.text, split="train")
        column = options.text_column
        require(
            column in rows.column_names,
            f"{options.text} has no column {column}; it has {', '.join(rows.column_names)}.",
        )
        rows = rows.rename_column(column, "text") if column != "text" else rows
        rows = rows.filter(lambda row: bool(row["text"] and row["text"].strip()))
        require(len(rows) > 1, f"{options.text} holds {len(rows)} texts; two splits need more.")
        cut = rows.train_test_split(options.validation_share, seed=0)
        parts = {"train": cut["train"], "validation": cut["test"]}
    parts["validation"] = parts["validation"].shuffle(seed=0)
    count = min(options.validation_texts, len(parts["validation"]))
    parts["validation"] = parts["validation"].select(range(count))
    return DatasetDict({split: part.select_columns(["text"]) for split, part in parts.items()})


def docstring_sentences(library: Path | None = None) -> list[tuple[str, str]]:
    """(module, sentence) of a library's documentation strings, each sentence once.

    In the order of the files; examples, headings and fragments are left out, tests too.

    Args:
        library: folder; by default that of Python's standard library.
    """
    library = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    seen: set[str] = set()
    found = []
    for path in sorted(library.rglob("*.py")):
        where = path.relative_to(library)
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(where.parts):
            continue
        for docstring in _docstrings(path):
            for sentence in _sentences(docstring):
                if sentence not in seen:
                    seen.add(sentence)
                    found.append((str(where), sentence))
    return found


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of code that is read, not run
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # a template of the library, not a module
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _sentences(docstring: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            words = sentence.split()
            letters = sum(character.isalpha() or character == " " for character in sentence)
            whole = sentence[:1].isupper() and sentence.endswith((".", "!", "?"))
            if whole and len(words) in _WORDS and letters > 0.85 * len(sentence):
                yield sentence
