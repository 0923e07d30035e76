"""The frame of a recipe whose one run can be stopped and resumed: before it, and where it ends early."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from loop import STOPPED, Stopped
from reporting import environment, write_text


def begin(
    recipe: str, accelerator: Accelerator, folder: Path, settings: Mapping[str, Any], resume: bool
) -> dict[str, Any]:
    """Writes down with what a run is made, and starts the trackers; returns its environment.

    Ends the program if checkpoints in the folder belong to another run, or would be lost.
    """
    _check_settings(folder, settings, resume)
    surroundings = environment(accelerator)
    if accelerator.is_main_process:
        resolved = {"settings": settings, "environment": surroundings}
        write_text(folder / "settings.json", json.dumps(resolved, indent=2) + "\n")
    # Trackers take no lists.
    accelerator.init_trackers(recipe, {key: str(value) for key, value in settings.items()})
    return surroundings


@contextmanager
def stoppable(accelerator: Accelerator) -> Iterator[None]:
    """Within it what makes a run impossible, or a signal, ends the program with one line."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        if accelerator.is_main_process:
            print(f"{stopped} Go on with --resume.", file=sys.stderr)
        accelerator.end_training()
        sys.exit(STOPPED)


def _check_settings(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    written = folder / "settings.json"
    if not any((folder / "checkpoints").glob("step-*")):
        return
    if not resume:
        sys.exit(
            f"error: {folder} holds checkpoints of an unfinished run; pass --resume to go on, or "
            "--overwrite to start again."
        )
    before = json.loads(written.read_text(encoding="utf-8"))["settings"]
    changed = [f"--{key} {before.get(key)}" for key in settings if settings[key] != before.get(key)]
    if changed:
        sys.exit(f"error: the run in {folder} had other settings: {', '.join(changed)}.")
