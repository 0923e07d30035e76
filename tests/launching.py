"""Recipes in processes of their own, without a GPU and with one thread each."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "recipes"

#: Module and options that start a recipe in one process, and in two.
ONE = ("accelerate.commands.launch", "--config_file", str(RECIPES / "configs" / "cpu.yaml"))
TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
#: Two processes that share the weights by FSDP2. Without a launcher in between, so that a signal
#: reaches what it is meant for.
SHARDED = (*TWO, str(Path(__file__).parent / "fsdp_on_cpu.py"))
_FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def _command(launcher: tuple[str, ...], recipe: str, options: tuple[str, ...]) -> list[str]:
    module = ["-m", *launcher] if launcher else []
    return [sys.executable, *module, str(RECIPES / recipe), *options]


def _environment(launcher: tuple[str, ...]) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "COLUMNS": "120",
        **(_FSDP if launcher == SHARDED else {}),
    }


def launch(
    launcher: tuple[str, ...], recipe: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Runs `recipes/<recipe>` with a launcher, or without one, and waits for it."""
    return subprocess.run(
        _command(launcher, recipe, options),
        env=_environment(launcher),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launch_and_interrupt(
    launcher: tuple[str, ...],
    recipe: str,
    *options: str,
    signal: int,
    when: Callable[[], bool],
) -> int:
    """Starts a recipe, sends it a signal as soon as something holds, and returns its exit status."""
    process = subprocess.Popen(
        _command(launcher, recipe, options),
        env=_environment(launcher),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 200
    try:
        while not when():
            if process.poll() is not None or time.monotonic() > deadline:
                told = process.communicate(timeout=10)[0].decode(errors="replace")
                raise AssertionError(f"it ended before it was interrupted:\n{told}")
            time.sleep(0.01)
        _send(process.pid, signal)
        process.communicate(timeout=100)
        return process.returncode
    finally:
        if process.poll() is None:
            _send(process.pid, 9)


def _send(pid: int, signal: int) -> None:
    """To a launcher and everything that it has started, in groups of their own."""
    launcher = psutil.Process(pid)
    for process in [*launcher.children(recursive=True), launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal)
