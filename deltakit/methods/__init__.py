"""All methods, one per file. A file is imported, which registers its method, when somebody asks for it.

>>> from deltakit import methods
>>> methods.lora.LoRA.name
'lora'
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Returns the file of this name, as `deltakit.methods.lora`."""
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
