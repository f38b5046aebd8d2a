"""All methods, one per file. Importing this package imports every file in it, which registers the methods."""

import pkgutil
from importlib import import_module

for _found in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")
