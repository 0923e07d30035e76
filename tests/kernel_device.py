"""Where the tests of the kernels run: on a GPU, or in Triton's interpreter (see `conftest`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
needs_interpreter = pytest.mark.skipif(GPU, reason="Triton's interpreter runs on the CPU")
