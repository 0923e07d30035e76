"""New attention mechanisms for Hugging Face Transformers.

Importing this package registers `"expressive"` and `"implicit_kernel"` as attention implementations of
Transformers.
"""

__version__ = "0.1.0"

from . import ops
from .auxiliary import auxiliary_loss, modules_to_save
from .config import ExpressiveConfig, ImplicitKernelConfig
from .context_parallel import context_parallel
from .discovery import supported_architectures
from .explain import explain
from .hooks import install as _install
from .hub import push
from .patcher import attach, detach
from .registry import register as _register
from .verify import VerificationError, verify

_register()
_install()

__all__ = [
    "ExpressiveConfig",
    "ImplicitKernelConfig",
    "VerificationError",
    "attach",
    "auxiliary_loss",
    "context_parallel",
    "detach",
    "explain",
    "modules_to_save",
    "ops",
    "push",
    "supported_architectures",
    "verify",
]
