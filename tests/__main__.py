"""Lint, format, types, tests: `python -m tests [pytest arguments]`. Ends at the first failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_STEPS = (
    ("lint", ["ruff", "check", "."]),
    ("format", ["ruff", "format", "--check", "."]),
    ("types", ["mypy"]),
    ("tests", ["pytest", "-n", "2", "--dist", "loadscope"]),
)


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    # One thread a worker: two workers with two threads each are slower than one of them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, command in _STEPS:
        arguments = sys.argv[1:] if name == "tests" else []
        print(f"== {name}: {' '.join(command + arguments)}", flush=True)
        code = subprocess.run(
            [sys.executable, "-m", *command, *arguments], cwd=root, env=environment, check=False
        ).returncode
        if code != 0:
            print(f"== {name} failed", flush=True)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
