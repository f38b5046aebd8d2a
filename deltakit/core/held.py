"""What is known of the delta modules that one module holds, so that hundreds of them are not looked at in each walk."""

from collections import Counter
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import nn

from deltakit.core.attached_module import HELD
from deltakit.core.delta_module import DeltaModule

_RECORD = attrgetter("record")


class Held:
    """The delta modules of a module whose children are all delta modules.

    The first of them keeps it, so that copies and pickles have it too. It is believed as long as the number of children and
    the name of the last one are those that it was made for: a child that the user adds is the last one.
    """

    def __init__(self, children: dict[str, Any]) -> None:
        self.kinds: dict[type, int] = _counted(map(type, children.values()), len(children))
        """How many of them there are of each class."""
        self.all_deltas = all(issubclass(kind, DeltaModule) for kind in self.kinds)
        self.records: dict[Any, int] = (
            _counted(map(_RECORD, children.values()), len(children)) if self.all_deltas else {}
        )
        """How many of them belong to each delta."""
        self.last = next(reversed(children))
        self.count = len(children)

    def fits(self, children: dict[str, Any]) -> bool:
        return self.count == len(children) and self.last == next(reversed(children))


def _counted(values: Iterator[Any], count: int) -> dict[Any, int]:
    # Nearly always there is one. There may also be hundreds, which C code counts.
    return {next(values): 1} if count == 1 else dict(Counter(values))


def held_in(children: dict[str, Any]) -> Held | None:
    """Returns what is known of the children of a module; None if they are not all delta modules, or there are none."""
    for first in children.values():
        if not isinstance(first, DeltaModule):
            return None
        known: Held | None = first.__dict__.get(HELD)
        if known is not None and known.fits(children):
            return known
        known = Held(children)
        if not known.all_deltas:
            return None
        first.__dict__[HELD] = known
        return known
    return None


def add_held(module: nn.Module, key: str, delta: DeltaModule) -> None:
    """Registers a delta module as a child, behind all others."""
    children: Any = module._modules
    known = held_in(children) if children and key not in children else None
    module.add_module(key, delta)
    if known is not None:
        # The count comes last: an interruption before it leaves one that does not fit, and all are looked at again.
        known.records[delta.record] = known.records.get(delta.record, 0) + 1
        known.kinds[type(delta)] = known.kinds.get(type(delta), 0) + 1
        known.last = key
        known.count += 1


def remove_held(module: nn.Module, key: str) -> None:
    """Removes a delta module from the children of a module."""
    children: Any = module._modules
    delta = children[key]
    known = held_in(children) if len(children) > 1 else None
    del children[key]
    delta.__dict__[HELD] = None
    if known is None or not children or next(iter(children.values())).__dict__.get(HELD) is not known:
        return
    counters: tuple[tuple[dict[Any, int], Any], ...] = ((known.records, delta.record), (known.kinds, type(delta)))
    for counts, mine in counters:
        counts[mine] -= 1
        if not counts[mine]:
            del counts[mine]
    known.last = next(reversed(children))
    known.count -= 1
