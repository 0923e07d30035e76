"""Runs a script with Accelerate's FSDP2 on processors: `fsdp_on_cpu.py script.py [options]`.

Accelerate reads the FSDP settings of its environment where processes have GPUs and leaves them out
where they have none; everything after that works on processors too. For tests only.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_original = AcceleratorState.__init__


def _initialise(state: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    is_new = not state.initialized
    _original(state, *args, fsdp_plugin=fsdp_plugin, **options)
    if is_new and fsdp_plugin is not None:
        assert state.distributed_type == DistributedType.MULTI_CPU
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _initialise
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
