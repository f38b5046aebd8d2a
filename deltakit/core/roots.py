"""Finds the module that a delta was attached to: its root.

The names in the record of a delta are relative to its root, so they mean nothing to a module around it or inside it. The
root is told by a hook that stands on it, which a deepcopy or a pickle takes along.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from deltakit.core.paths import noted, own_modules


class RootHook:
    """A forward pre-hook on the root of deltas. `holdings` has the record of each of them."""

    holdings: Mapping[Any, Any]


def rooted_at(module: nn.Module) -> Collection[Any]:
    """Returns the records of the deltas that were attached to this module, and not to one around it or inside it."""
    hooks: Mapping[int, Any] = module._forward_pre_hooks
    # Nearly all modules have none. By class first, because a module may have thousands of weight patches.
    if not hooks or not any(issubclass(kind, RootHook) for kind in set(map(type, list(hooks.values())))):
        return ()
    return [record for hook in list(hooks.values()) if isinstance(hook, RootHook) for record in hook.holdings]


def roots_inside(backbone: nn.Module) -> dict[Any, tuple[str, nn.Module]]:
    """Returns the records of the deltas that were attached to a module inside a backbone, with its path and the module."""
    return noted(backbone, "roots", _roots_inside)


def _roots_inside(backbone: nn.Module) -> dict[Any, tuple[str, nn.Module]]:
    found: dict[Any, tuple[str, nn.Module]] = {}
    for path, module in own_modules(backbone):
        if module._forward_pre_hooks and module is not backbone:
            found.update(dict.fromkeys(rooted_at(module), (path, module)))
    return found
