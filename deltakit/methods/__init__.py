"""All methods, one per file. A file is imported, which registers its method, when somebody asks for it.

>>> from deltakit import methods
>>> methods.lora.LoRA.name
'lora'
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pkgutil import iter_modules as _iter_modules
from types import ModuleType as _ModuleType


def __getattr__(name: str) -> _ModuleType:
    """Returns the file of this name, as `deltakit.methods.lora`."""
    if not name.isidentifier() or name.startswith("_") or _find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(found.name for found in _iter_modules(__path__))})
