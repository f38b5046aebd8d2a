"""Narrows a module's `state_dict()` to a few tensors while a delta is attached, as OpenDelta's `freeze_module` does."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from deltakit.core import Record, records_in
from deltakit.injection.tables import ours, unhook

_WHOLE: ContextVar[bool] = ContextVar("deltakit_whole_state_dict", default=False)


class StateDictFilter:
    """Leaves only some tensors of a module in its state dict.

    A hook, and not another `state_dict` on the instance: a deepcopy of such a function would still read the original, and a
    model with one could not be pickled. A parent's state dict stays whole: the parent's `save_pretrained` would write a model
    without its weights.

    Args:
        names: the names to leave, relative to the module.
        record: the delta's record. The filter does nothing where the delta is not attached (in a copy without it).
    """

    def __init__(self, names: Collection[str], record: Record) -> None:
        self.names, self.record = frozenset(names), record

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if prefix or _WHOLE.get() or self.record not in records_in(module):
            return
        for name in state.keys() - self.names:
            del state[name]


def narrow_state_dict(module: nn.Module, names: Collection[str], record: Record) -> None:
    """Leaves only these names in a module's state dict, until `widen_state_dict`. An earlier filter of it is replaced."""
    unhook(module, ours(module, StateDictFilter))
    module.register_state_dict_post_hook(StateDictFilter(names, record))
    record.narrowed = True


def is_narrowed(module: nn.Module) -> bool:
    """Returns whether the state dict of a module has only some of its tensors."""
    return any(one.record in records_in(module) for one in ours(module, StateDictFilter))


def widen_state_dict(module: nn.Module, record: Record) -> None:
    """Removes the filters of a delta from a module and all modules in it."""
    for inner in module.modules():
        if inner._state_dict_hooks:
            unhook(inner, [one for one in ours(inner, StateDictFilter) if one.record is record])


def is_whole_state_dict() -> bool:
    """Returns whether the caller is in a `whole_state_dict` block."""
    return _WHOLE.get()


@contextmanager
def whole_state_dict() -> Iterator[None]:
    """In this block and thread, filters leave everything in state dicts."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)
