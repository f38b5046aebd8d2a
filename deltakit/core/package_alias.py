"""Serves a package under the name of another one."""

import pkgutil
import sys
from importlib import import_module

from deltakit.errors import StateError


def alias_package(package: str, name: str) -> None:
    """Makes `import name`, and imports of its modules, import a package of deltakit.

    Args:
        package: the package's full name.
        name: the name that it gets, too.

    Raises:
        StateError: if a package with this name is imported already.
    """
    own = sys.modules[package]
    if sys.modules.get(name) not in (None, own):
        raise StateError(f"{name} is imported already; call {package}.install() before `import {name}`")
    found = pkgutil.walk_packages(own.__path__, f"{package}.")
    for one in [package, *(module.name for module in found)]:
        sys.modules[name + one.removeprefix(package)] = import_module(one)
