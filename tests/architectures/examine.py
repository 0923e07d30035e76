"""Run the checks of an architecture and say how it ended."""

import subprocess
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

from hf_expressive.discovery import pooling_modules

from .builder import build
from .checks import NotApplicable, checks_of
from .exceptions import KEEP_EAGER, REFUSED

Outcome = Literal["passed", "refused", "failed"]


@dataclass
class Result:
    """How one architecture fared.

    Attributes:
        built: whether the tiny model could be built and its inputs made.
        outcome: `refused` means that the package rightly refuses all of it.
        eager_parts: parts that compute their own softmax and stayed eager.
        pooling: classes that pool by a softmax of their own.
        checks: names of the checks that ran.
        commit: what was measured.
        failures: reason by check.
        not_applicable: reason by check that has no meaning here.
    """

    name: str
    family: str
    built: bool
    outcome: Outcome
    eager_parts: list[str] = field(default_factory=list)
    pooling: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    commit: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


@cache
def _commit() -> str:
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def examine(name: str, only: set[str] | None = None) -> Result:
    """Every check of `name` (or those named in `only`), each tried whatever the others gave."""
    started = time.perf_counter()
    try:
        case = build(name)
        case.inputs()
    except Exception as error:  # reported by name, the table goes on
        return Result(name, "unknown", False, "failed", failures={"build": _reason(error)})
    result = Result(name, case.family, True, "refused" if name in REFUSED else "passed")
    result.eager_parts = [part or "the model's own config" for part in KEEP_EAGER.get(name, ())]
    result.pooling = sorted({type(found.module).__name__ for found in pooling_modules(case.model)})
    for check in checks_of(name):
        if only and check.__name__ not in only:
            continue
        result.checks.append(check.__name__)
        try:
            check(name)
        except NotApplicable as reason:
            result.not_applicable[check.__name__] = str(reason)
        except Exception as error:  # reported by name, the table goes on
            result.failures[check.__name__] = _reason(error)
            result.outcome = "failed"
    result.commit = _commit()
    result.seconds = round(time.perf_counter() - started, 2)
    return result
