"""Recipes in processes of their own, without a GPU and with one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "recipes"

#: Module and options that start a recipe in one process, and in two.
ONE = ("accelerate.commands.launch", "--config_file", str(RECIPES / "configs" / "cpu.yaml"))
TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launch(
    launcher: tuple[str, ...], recipe: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Runs `recipes/<recipe>` with a launcher and waits for it."""
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(RECIPES / recipe), *options],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "COLUMNS": "120",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
