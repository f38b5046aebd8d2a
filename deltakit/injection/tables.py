"""Finds and removes deltakit's hooks in the tables of a module.

Not by the handles that torch returns: they do not follow a deepcopy, and Ctrl-C between a registration and the assignment of
its handle would leave a hook that nobody can remove.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from torch import nn

from deltakit.core import own_modules

# In one call of C code: all modules are asked for their tables at each attach.
_tables_in = itemgetter(
    "_forward_pre_hooks",
    "_forward_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
# The tables that say how the hooks of another table are called.
_HOW = {
    "_forward_pre_hooks_with_kwargs": "_forward_pre_hooks",
    "_forward_hooks_with_kwargs": "_forward_hooks",
    "_forward_hooks_always_called": "_forward_hooks",
}


# Tables are copied before they are read: another thread may change them.
def ours(module: nn.Module, kind: type[Any] | tuple[type[Any], ...]) -> list[Any]:
    """Returns the hooks of some of our classes on a module, each once: hooks, or the objects whose methods are hooks."""
    # Nearly all tables are empty.
    found = [_object_of(hook) for table in _tables_in(module.__dict__) if table for hook in list(table.values())]
    if not found:
        return []
    return list(dict.fromkeys(hook for hook in found if isinstance(hook, kind)))


def ids_of_modules(backbone: nn.Module) -> set[int] | None:
    """Returns the ids of all modules of a backbone; None if another thread attaches or detaches a delta just now."""
    try:
        return {id(module) for _, module in own_modules(backbone)}
    except RuntimeError:
        # A table of modules changed while Python was reading it.
        return None


def unhook(module: nn.Module, hooks: Sequence[Any]) -> None:
    """Removes hooks from a module. It can be repeated after an interruption."""
    own = module.__dict__
    if hooks:
        removed = {id(hook) for hook in hooks}
        for table in filter(None, _tables_in(own)):
            for number in [number for number, hook in list(table.items()) if id(_object_of(hook)) in removed]:
                table.pop(number, None)
    for about, name in _HOW.items():
        # Also what an interruption left of hooks that are gone.
        if own[about]:
            for number in {*own[about]} - {*own[name]}:
                own[about].pop(number, None)


def stand(kind: type[Any], module: nn.Module, register: Callable[[Any], Any], *, wanted: bool) -> None:
    """Registers one hook of a class on a module if it is wanted, and removes it if not."""
    there = ours(module, kind)
    if wanted and not there:
        register(kind())
    elif not wanted:
        unhook(module, there)


def _object_of(hook: Any) -> Any:
    """Returns the object whose method a hook is, or the hook itself."""
    # torch wraps the hooks that it calls before loading a state dict.
    hook = getattr(hook, "hook", hook)
    return getattr(hook, "__self__", hook)
