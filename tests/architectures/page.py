"""The page of supported architectures: written from the results of a run, and read back."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .examine import Result
from .exceptions import NO_SPECTRAL_KERNEL, REFUSED

PAGE = Path(__file__).parents[2] / "model_cards" / "architectures.md"

FAMILIES = (
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
#: Column → the checks that it stands for.
_COLUMNS = {
    "forward": ("package_is_dense",),
    "backward": ("gradients_are_dense",),
    "cache": ("cached_is_uncached",),
    "static cache": ("static_is_dynamic",),
    "reload": ("reloads",),
    "bf16": ("bfloat16_is_finite",),
    "RBF = softmax": ("rbf_is_softmax",),
    "learned kernel": (
        "kernel_is_dense",
        "kernel_learns",
        "kernel_cached_is_uncached",
        "kernel_reloads",
    ),
}
_INTRODUCTION = """\
# Architectures

Which architectures of Transformers run the mechanisms of this package, written by

```bash
python -m tests.architectures --page
```

It builds a tiny random model of each architecture that asks Transformers' attention registry and
compares it with a plain dense implementation of the same formula. A name with a slash is a further
model of the same architecture.

| column | ✓ means |
|---|---|
| forward | outputs equal the dense witness's to 1e-4: without, with left and with right padding |
| backward | every parameter's gradient equals the witness's |
| cache, static cache | greedy decoding with a cache equals that without, a static one a dynamic one |
| reload | saved and loaded from its path alone, the outputs are the same |
| bf16 | finite in bfloat16 wherever it is in float32 |
| RBF = softmax | `kernel="rbf", p=2.0` reproduces the model's own softmax to 1e-5 |
| learned kernel | `kernel="direct"`: forward, gradients that reach the frequencies, cache, reload |

– means that it has no meaning there (no generation, no padded text, or the witness or eager attention
fails it too), ✗ that it fails. *Left as it is* names what never asks the registry and stays what it
was: sub-configs to leave on `"eager"` (asked for the whole model, the mechanism is refused with the
dict to pass), and pooling by one learned query, which compares no token with another. An empty cell was
not measured.
"""


def table(results: Iterable[Result]) -> list[str]:
    """Outcomes by family."""
    results = list(results)
    lines = ["| family | built | passed | refused | failed |", "|---|---|---|---|---|"]
    for family in (*FAMILIES, "all"):
        rows = [result for result in results if family in (result.family, "all")]
        if rows:
            outcomes = Counter(result.outcome for result in rows)
            counts = [sum(result.built for result in rows)]
            counts += [outcomes[outcome] for outcome in ("passed", "refused", "failed")]
            lines.append(f"| {family} | " + " | ".join(map(str, counts)) + " |")
    return lines


def notes(results: Iterable[Result]) -> list[str]:
    """What did not simply pass, by name, with the reason."""
    lines = []
    for result in results:
        lines += [
            f"- {result.name}: failed {check}: {why}" for check, why in result.failures.items()
        ]
        if result.outcome == "refused":
            lines.append(f"- {result.name}: refused: {REFUSED[result.name]}")
        if result.name in NO_SPECTRAL_KERNEL:
            lines.append(
                f"- {result.name}: no learned kernel, which is refused: "
                f"{NO_SPECTRAL_KERNEL[result.name]}"
            )
    return lines


def row(result: Result) -> str:
    """The line of one architecture."""
    cells = [result.name, result.family]
    for checks in _COLUMNS.values():
        if result.outcome == "refused":
            cells.append("refused" if checks == ("package_is_dense",) else "")
        elif checks[0] not in result.checks:
            cells.append("refused" if result.name in NO_SPECTRAL_KERNEL else "")
        elif any(check in result.failures for check in checks):
            cells.append("✗")
        elif all(check in result.not_applicable for check in checks):
            cells.append("–")
        else:
            cells.append("✓")
    cells.append(", ".join([*(f"`{part}`" for part in result.eager_parts), *result.pooling]))
    return "| " + " | ".join(cells) + " |"


def write(results: list[Result], versions: dict[str, str], date: str) -> str:
    """The whole page."""
    commits = Counter(result.commit for result in results)
    measured = ", ".join(f"{commit} ({count} lines)" for commit, count in commits.most_common())
    heading = ["architecture", "family", *_COLUMNS, "left as it is"]
    run = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(
        [
            _INTRODUCTION,
            f"Written on {date}, measured with {run}, at commit {measured}.",
            "",
            *table(results),
            "",
            *notes(results),
            "",
            "| " + " | ".join(heading) + " |",
            "|" + "---|" * len(heading),
            *(row(result) for result in sorted(results, key=lambda result: result.name)),
            "",
        ]
    )


def read(text: str) -> tuple[str, dict[str, str]]:
    """(version of Transformers, line by architecture) of a page."""
    version = re.search(r"transformers ([\w.]+)", text)
    assert version is not None, "the page does not tell its version of Transformers"
    body = text[text.index("| architecture |") :].splitlines()[2:]
    lines = {line.split("|")[1].strip(): line for line in body if line.startswith("|")}
    return version.group(1), lines
