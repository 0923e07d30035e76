"""Writes the kernels as a repository for the `kernels` library, which needs this package no more.

    build/torch-cuda/   __init__.py (`kernel_entry`), ops/, metadata.json
    build/torch-cpu/    the same
    README.md

The files are plain Python and Triton, so one build serves every version of torch and every GPU. What is
published on the branch `v1` is loaded by Transformers as `attn_implementation="owner/name"`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from . import __version__

#: Of the interface, not of the package: a change that breaks users gets a new number, and a new branch.
KERNEL_VERSION = 1
_NAME = "expressive-attention"
_BACKENDS = ("cpu", "cuda")
_PACKAGE = Path(__file__).parent

_README = f"""---
license: apache-2.0
tags:
- kernels
---

# {_NAME}

Expressive attention, weights z²/(1+z²) with z = scale · q·k, normalised by row, for PyTorch: fused
Triton kernels on GPUs, a blockwise implementation on CPUs, forward and backward in memory linear in the
length. Written by hf_expressive {__version__}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="OWNER/{_NAME}")
```

Transformers asks for `allow_all_kernels=True` as well where it does not know the publisher. A checkpoint
that was saved with hf_expressive runs with its own scale and power. Learned gains, hybrids with
softmax attention and implicit kernel attention need the package.

```python
from kernels import get_kernel

expressive_attention = get_kernel("OWNER/{_NAME}", version={KERNEL_VERSION}).expressive_attention
```

Source: C. Gros, [arXiv:2407.18601](https://arxiv.org/abs/2407.18601).
"""


def write_kernel_repository(folder: Path) -> Path:
    """Writes the repository into a new or empty folder.

    Args:
        folder: where to. Its content is complete or absent.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        staging = Path(name) / "repository"
        for backend in _BACKENDS:
            _write_build(staging / "build" / f"torch-{backend}", backend)
        (staging / "README.md").write_text(_README, encoding="utf-8")
        staging.replace(folder)
    return folder


def _write_build(folder: Path, backend: str) -> None:
    shutil.copytree(_PACKAGE / "ops", folder / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(_PACKAGE / "kernel_entry.py", folder / "__init__.py")
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.update(path.read_bytes())
    metadata = {
        # The name of the module in the process: kernels of several versions go side by side.
        "id": f"_{_NAME.replace('-', '_')}_{backend}_{content.hexdigest()[:12]}",
        "name": _NAME,
        "version": KERNEL_VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    text = json.dumps(metadata, indent=2) + "\n"
    (folder / "metadata.json").write_text(text, encoding="utf-8")
