"""What a delta needs before it may be attached or changed: a free name, free places, no block that holds it."""

import math
from dataclasses import replace

from deltakit.core import Attachment, GradLedger, Record, key_of, records_of
from deltakit.errors import OptionError, StateError


def claim(attachment: Attachment) -> None:
    """Gives a delta that is to be attached its name among the others, and the grad_ledger that it shares with them.

    Raises:
        StateError: if the name or a place is taken, or another delta trains the same whole.
    """
    record = attachment.record
    others = records_of(attachment.backbone)
    name = free_name(record.name, others, chosen=record.named)
    for other in others:
        refuse_in_rows(name, other)
        both = sorted({*other.fully_trained} & {*record.fully_trained})
        if both:
            raise StateError(f"{both[0]}: delta {other.name!r} trains it whole already; detach() that one first")
    named = replace(record, name=name)
    for site in attachment.sites:
        key = key_of(named, site.method, site.module.part)
        if hasattr(site.target, key):
            raise StateError(f"{site.path}: it has an attribute {key!r} of its own; choose another name= for the delta")
    record.name = name
    record.grad_ledger = others[0].grad_ledger if others else GradLedger()


def refuse_in_rows(name: str, record: Record, what: str = "attach or detach") -> None:
    """Raises `StateError` if a delta is to change while rows of a batch belong to those on its backbone."""
    if record.batch is not None:
        raise StateError(f"delta {name!r}: its backbone is in a rows() block; leave the block before {what}")


def refuse_merged(record: Record, what: str) -> None:
    """Raises `StateError` if a delta is to change while it is merged into the weights."""
    if record.merged:
        raise StateError(f"delta {record.name!r} is merged into the weights: unmerge() it before {what}")


def check_scale(attachment: Attachment, scale: float) -> None:
    """Raises `OptionError` if a scale is none, `StateError` if the delta cannot take one, or not now."""
    record = attachment.record
    name = record.name
    if not math.isfinite(scale):
        raise OptionError(f"delta {name!r}: scale={scale!r}: expected a finite number")
    refuse_merged(record, "changing scale")
    refuse_in_rows(name, record, "changing scale")
    if record.fully_trained:
        raise StateError(
            f"delta {name!r} fully trains {record.fully_trained[0]}, whose values are in the backbone itself: "
            "such a delta cannot be scaled"
        )
    for site in attachment.sites:
        if not site.module.scalable:
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


def refuse_scaled(record: Record) -> None:
    """Raises `StateError` if a delta that is to be saved has another scale than 1."""
    if record.scale != 1:
        raise StateError(
            f"delta {record.name!r} has the scale {record.scale:g}, which no file holds: set scale = 1 to save it as it was "
            f"trained, or, of LoRA and BitFit, save combine(model, {{{record.name!r}: {record.scale:g}}}).delta"
        )
