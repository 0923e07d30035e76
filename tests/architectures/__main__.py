"""Check every architecture of the installed Transformers: `python -m tests.architectures [names]`.

Prints one line for each architecture as it is done and a table by family at the end; `--json`
writes all results, `--markdown` the table and the list of what did not pass. Ends with 1 if
anything failed.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

import hf_expressive

from . import dense
from .builder import architectures, parts
from .examine import Result, examine

_FAMILIES = (
    "decoder",
    "encoder",
    "encoder-decoder",
    "vision",
    "audio",
    "multimodal",
    "time series",
    "other",
    "unknown",
)


def _table(results: list[Result]) -> list[str]:
    lines = ["| family | built | passed | refused | failed |", "|---|---|---|---|---|"]
    for family in (*_FAMILIES, "all"):
        rows = [result for result in results if family in (result.family, "all")]
        if rows:
            outcomes = Counter(result.outcome for result in rows)
            counts = [sum(result.built for result in rows)]
            counts += [outcomes[outcome] for outcome in ("passed", "refused", "failed")]
            lines.append(f"| {family} | " + " | ".join(map(str, counts)) + " |")
    return lines


def _notes(results: list[Result]) -> list[str]:
    lines = []
    for result in results:
        lines += [
            f"- {result.name}: failed {check}: {why}" for check, why in result.failures.items()
        ]
        if result.outcome == "refused":
            lines.append(f"- {result.name}: refused")
        elif result.eager_parts:
            lines.append(f"- {result.name}: passed with {', '.join(result.eager_parts)} left eager")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; default all")
    parser.add_argument("--checks", nargs="*", help="only these checks")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    dense.register()

    results = []
    for name in arguments.names or [*architectures(), *parts()]:
        result = examine(name, set(arguments.checks or ()))
        results.append(result)
        print(
            f"{result.outcome:8} {result.seconds:6.1f}s  {name}",
            *result.failures.values(),
            flush=True,
        )

    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "hf_expressive": hf_expressive.__version__,
    }
    report = "\n".join([*_table(results), "", *_notes(results), ""])
    print(f"\n{report}")
    if arguments.json:
        data = {"versions": versions, "results": [result.to_dict() for result in results]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        heading = ", ".join(f"{name} {version}" for name, version in versions.items())
        arguments.markdown.write_text(f"{heading}\n\n{report}", encoding="utf-8")
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
