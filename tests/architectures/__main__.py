"""Check every architecture of the installed Transformers: `python -m tests.architectures [names]`.

Prints one line for each architecture as it is done and a table by family at the end; `--json` writes
all results as they come, `--resume` goes on with such a file, `--page` writes the page of supported
architectures (model_cards/architectures.md). Ends with 1 if anything failed.
"""

import argparse
import datetime
import json
import sys
import warnings
from pathlib import Path

import torch
import transformers

import hf_expressive

from . import dense, page
from .builder import architectures, parts
from .examine import Result, examine


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; default all")
    parser.add_argument("--checks", nargs="*", help="only these checks")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has")
    parser.add_argument("--page", action="store_true", help="write the page")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    dense.register()

    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "hf_expressive": hf_expressive.__version__,
    }
    results: list[Result] = []
    if arguments.resume and arguments.json.exists():
        content = json.loads(arguments.json.read_text(encoding="utf-8"))
        if content["versions"] != versions:
            parser.error(f"{arguments.json} is a run of {content['versions']}, not {versions}")
        results = [Result(**result) for result in content["results"]]
    done = {result.name for result in results}
    for name in arguments.names or [*architectures(), *parts()]:
        if name in done:
            continue
        result = examine(name, set(arguments.checks or ()))
        results.append(result)
        print(
            f"{result.outcome:8} {result.seconds:6.1f}s  {name}",
            *result.failures.values(),
            flush=True,
        )
        if arguments.json:
            data = {"versions": versions, "results": [result.to_dict() for result in results]}
            arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    print("\n".join(["", *page.table(results), "", *page.notes(results)]))
    if arguments.page:
        today = datetime.date.today().isoformat()
        page.PAGE.write_text(page.write(results, versions, today), encoding="utf-8")
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
