"""Every method, one file each. Importing this package imports every file beside it, which registers its methods."""

import pkgutil
from importlib import import_module

for _found in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")
