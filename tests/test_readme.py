"""The README's code runs, one block after the other, and its commands name what exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from hf_expressive.cli import parser

_ROOT = Path(__file__).resolve().parent.parent
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run(capsys: Any) -> None:
    blocks = re.findall(r"```python\n(.*?)```", _README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "passed" in printed
    assert "FAILED" not in printed
    assert namespace["out"].shape == (2, 8, 100, 64)


def test_files_it_names_exist() -> None:
    paths = re.findall(r"\]\(([^)#]+)\)", _README)
    paths += re.findall(r"(?:recipes|tests|model_cards)/[\w./-]+\.\w+", _README)
    missing = [path for path in paths if "://" not in path and not (_ROOT / path).exists()]
    assert not missing


def test_hub_commands_are_understood() -> None:
    """Each line parses; what the commands do is tested with the command line."""
    lines = _README.split("<!-- commands: hub -->")[1].split("```bash\n")[1].split("```")[0]
    commands = [shlex.split(line) for line in lines.splitlines()]
    assert {command[1] for command in commands} == {
        "card",
        "convert",
        "info",
        "kernel",
        "push",
        "verify",
    }
    for program, *arguments in commands:
        assert program == "hf-expressive"
        assert callable(parser().parse_args(arguments).run)


def test_ci_runs_the_readme_command() -> None:
    command = _README.split("<!-- command: tests -->")[1].split("```")[1]
    assert "python -m tests" in command
    assert "<!-- command: tests -->" in (_ROOT / ".ci" / "run").read_text(encoding="utf-8")
