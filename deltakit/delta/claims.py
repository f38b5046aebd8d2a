"""What a delta needs before it may be attached or changed: a free name, free places, no block that holds it."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from deltakit.core import Ledger, Record, Site, can_scale, key_of, records_of
from deltakit.errors import OptionError, StateError


def claim(backbone: nn.Module, record: Record, sites: Sequence[Site]) -> None:
    """Gives a delta that is to be attached its name among the others, and the ledger that it shares with them.

    Raises:
        StateError: if the name or a place is taken, or another delta trains the same whole.
    """
    others = records_of(backbone)
    name = free_name(record.name, others, chosen=record.named)
    for other in others:
        refuse_in_rows(name, other)
        both = sorted(other.whole.keys() & record.whole.keys())
        if both:
            raise StateError(f"{both[0]}: delta {other.name!r} trains it whole already; detach() that one first")
    named = replace(record, name=name)
    for site in sites:
        key = key_of(named, site.method, site.module.place)
        if hasattr(site.target, key):
            raise StateError(f"{site.path}: it has an attribute {key!r} of its own; choose another name= for the delta")
    record.name = name
    record.ledger = others[0].ledger if others else Ledger()


def refuse_in_rows(name: str, record: Record, what: str = "attach or detach") -> None:
    """Raises `StateError` if a delta is to change while rows of a batch belong to those on its backbone."""
    if record.batch is not None:
        raise StateError(f"delta {name!r}: a rows() block holds on its backbone; leave it before {what}")


def check_scale(record: Record, sites: Sequence[Site], scale: float) -> None:
    """Raises `OptionError` if a scale is none, `StateError` if the delta cannot take one, or not now."""
    name = record.name
    if not math.isfinite(scale):
        raise OptionError(f"delta {name!r}: scale={scale!r}: expected a finite number")
    if record.merged:
        raise StateError(f"delta {name!r} is merged into the weights: unmerge() it before changing scale")
    refuse_in_rows(name, record, "changing scale")
    if record.whole:
        raise StateError(
            f"delta {name!r} trains {next(iter(record.whole))} whole, which is in the backbone at its full effect: "
            "such a delta has no scale"
        )
    for site in sites:
        if not can_scale(site.module):
            raise StateError(
                f"{site.path}: a {type(site.module).__name__} is not a change that is added to an output, so it has no scale; "
                "switch it off by active, or leave it as it is"
            )


def free_name(wanted: str, others: list[Record], *, chosen: bool) -> str:
    """A name that no other attached delta has: the wanted one, or, unless the user chose it, one with a number.

    Raises:
        StateError: if the user chose it and it is taken.
    """
    taken = {record.name for record in others}
    if wanted not in taken:
        return wanted
    if chosen:
        raise StateError(
            f"a delta named {wanted!r} is attached already; give this one another name=, or detach that one"
        )
    return next(name for name in (f"delta_{number}" for number in range(2, len(taken) + 3)) if name not in taken)
