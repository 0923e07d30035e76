"""A recorder of the largest tensor that is made while it is active."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Records the most bytes that one tensor had; it does not see into custom operators."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # Tensor subclasses are counted by their parts; expanded views by what they take.
            if type(tensor) is Tensor:
                self.largest_bytes = max(self.largest_bytes, tensor.untyped_storage().nbytes())
        return result
