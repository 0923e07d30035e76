"""New attention mechanisms for Hugging Face Transformers.

Importing this package registers `"expressive"` as an `attn_implementation` of Transformers.
"""

__version__ = "0.1.0"

from . import ops
from .config import ExpressiveConfig
from .discovery import supported_architectures
from .explain import explain
from .hooks import install as _install
from .patcher import attach, detach
from .registry import register as _register
from .verify import VerificationError, verify

_register()
_install()

__all__ = [
    "ExpressiveConfig",
    "VerificationError",
    "attach",
    "detach",
    "explain",
    "ops",
    "supported_architectures",
    "verify",
]
