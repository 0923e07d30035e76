"""New attention mechanisms for Hugging Face Transformers.

Importing this package registers `"expressive"` as an `attn_implementation` of Transformers.
"""

from . import ops
from .config import ExpressiveConfig

__version__ = "0.1.0"

from .hooks import install as _install
from .patcher import attach, detach
from .registry import register as _register

_register()
_install()

__all__ = ["ExpressiveConfig", "attach", "detach", "ops"]
