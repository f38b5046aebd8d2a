"""Checks before a delta is attached or changed: is its name free, are its targets free, is it in a `rows` block?"""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from deltakit.core import (
    Attachment,
    GradLedger,
    Record,
    Site,
    are_apart,
    attachments_of,
    copy_buffers,
    keyed,
    notice_moved_buffers,
    records_of,
    roots_inside,
)
from deltakit.delta.composition import refuse_beside_merged
from deltakit.delta.full_training import refuse_taken
from deltakit.delta.running_statistics import held_of, holding_word
from deltakit.errors import StateError
from deltakit.injection import records_around


def claim(attachment: Attachment) -> None:
    """Gives a delta its final name before it is attached, and the ledger that it shares with the others.

    Raises:
        StateError: if the name is taken, a target has an attribute of that name or the same method from another delta,
            another delta fully trains the same parameters or is merged into them, the backbone is in a `rows` block, a
            delta is merged beside which this one would compute something else, or a delta is attached to a part of the
            backbone, or to a model around it.
    """
    record = attachment.record
    _refuse_other_roots(attachment.backbone)
    others = records_of(attachment.backbone)
    name = free_name(record.name, others, chosen=record.named)
    for other in others:
        refuse_in_rows(name, other)
    if others:
        notice_moved_buffers(attachment.backbone, others[0])
    refuse_taken(attachment, record.fully_trained)
    if others and not record.named:
        _refuse_stacking(attachment, attachments_of(attachment.backbone))
    named = replace(record, name=name)
    keys: set[tuple[int, str]] = set()
    for site, key in keyed(named, attachment.sites):
        if (id(site.target), key) in keys:
            raise StateError(
                f"{site.path}: its delta module would be named {key!r}, as that of another parameter of the same module; "
                "attach to one of the two with a delta of its own, under another name="
            )
        keys.add((id(site.target), key))
        if hasattr(site.target, key):
            raise StateError(f"{site.path}: it has an attribute {key!r} of its own; choose another name= for the delta")
    # Deltas at one target apply in the order of their first attachment, even if they were never attached at the same time.
    # So the order is a time, not a count of the attached deltas.
    order = record.order or max([time.time_ns(), *(other.order + 1 for other in others)])
    if record.active and any(other.merged for other in others):
        refuse_beside_merged(replace(attachment, record=replace(record, order=order)))
    record.name = name
    record.order = order
    record.grad_ledger = others[0].grad_ledger if others else GradLedger()
    record.buffer_ledger = others[0].buffer_ledger if others else copy_buffers(attachment.backbone)


def _refuse_other_roots(backbone: nn.Module) -> None:
    """Refuses a backbone inside which, or around which, another module has a delta."""
    # Each of the two would keep flags, values and guards of the other's by other names, and put them back at the wrong time.
    advice = (
        "attach both to the same module (at= takes the path of the part), or detach() that delta first: "
        "deltakit.deltas(model) has its handle"
    )
    for record, (path, root) in roots_inside(backbone).items():
        raise StateError(f"{path}: delta {record.name!r} is attached to this {type(root).__name__} alone; {advice}")
    for record in records_around(backbone):
        raise StateError(
            f"this {type(backbone).__name__} has parts of delta {record.name!r}, which is attached to a model around it; "
            f"{advice}"
        )


def _refuse_stacking(attachment: Attachment, others: Sequence[Attachment]) -> None:
    """Refuses a delta without a name of its own on a target that has the same method already."""
    # In a notebook, a cell that attaches or loads a delta is easily run twice. Without an error its effect would double.
    # By module, because one place has several paths: `query` and `query.weight`, a fused projection and its slices.
    taken: dict[tuple[int, str], list[tuple[Site, str]]] = {}
    for other in others:
        for site in other.sites:
            method = other.record.methods[site.method].name
            taken.setdefault((id(site.target), method), []).append((site, other.record.name))
    for site in attachment.sites:
        method = attachment.record.methods[site.method].name
        for there, name in taken.get((id(site.target), method), ()):
            if not are_apart(there.module.part, site.module.part):
                raise StateError(
                    f"{there.path}: delta {name!r} has a {method} there already; detach() that delta first, or give this one "
                    "a name= to have both"
                )


def refuse_in_rows(name: str, record: Record, what: str = "attach or detach") -> None:
    """Refuses to change a delta inside a `rows` block of its backbone.

    Args:
        what: what the user wanted to do, for the error message.

    Raises:
        StateError: if the backbone is in a `rows` block.
    """
    if record.open_blocks:
        raise StateError(f"delta {name!r}: its backbone is in a rows() block; leave the block before {what}")


def refuse_unloaded(record: Record) -> None:
    """Refuses to use a delta that is in the backbone's weights for good.

    Raises:
        StateError: if it is.
    """
    if record.unloaded:
        raise StateError(
            f"delta {record.name!r} is in the backbone's weights for good (merge_and_unload), and would apply twice; save() "
            "it, and load it onto a fresh backbone"
        )


def refuse_merged(record: Record, what: str) -> None:
    """Refuses to change a merged delta.

    Args:
        what: what the user wanted to do, for the error message.

    Raises:
        StateError: if the delta is merged.
    """
    if record.merged:
        raise StateError(f"delta {record.name!r} is merged into the weights: unmerge() it before {what}")


def check_freezing(attachment: Attachment, *, training: bool) -> None:
    """Checks that a delta may freeze its backbone, and fully train parts of it if `training`.

    Raises:
        StateError: if the delta is not attached, or is to train and is merged, scaled or in a `rows` block.
    """
    record = attachment.record
    if not attachment.attached:
        raise StateError(f"delta {record.name!r} is not attached: attach() it before freezing its backbone")
    if not training:
        return
    refuse_merged(record, "training parts of the backbone")
    refuse_in_rows(record.name, record, "training parts of the backbone")
    if record.scale != 1:
        raise StateError(
            f"delta {record.name!r} has the scale {record.scale:g}, which cannot apply to fully trained parts: set scale = 1 "
            "before training parts of the backbone"
        )


def check_scalable(attachment: Attachment) -> None:
    """Checks that a delta may get another scale.

    Raises:
        StateError: if the delta is merged or in a `rows` block, fully trains parts of the backbone, or has a method without
            a scale.
    """
    record = attachment.record
    name = record.name
    refuse_merged(record, "changing scale")
    refuse_in_rows(name, record, "changing scale")
    for held in held_of(attachment)[:1]:
        raise StateError(
            f"delta {name!r} {holding_word(attachment.backbone, held)}, whose values are in the backbone itself, so it "
            "cannot be scaled; leave its scale at 1"
        )
    for site in attachment.sites:
        if not site.module.scalable:
            raise StateError(
                f"{site.path}: a {site.module.word()} does not add to an output, so it has no scale; leave the delta's scale "
                "at 1, or switch the delta off by active = False"
            )


def free_name(wanted: str, others: list[Record], *, chosen: bool) -> str:
    """Returns a name that no other attached delta has: the wanted one, or one with a number if that is taken.

    Args:
        chosen: whether the user chose the name, so that it must not be changed.

    Raises:
        StateError: if the user chose it and it is taken.
    """
    taken = {record.name for record in others}
    if wanted not in taken:
        return wanted
    if chosen:
        raise StateError(
            f"a delta named {wanted!r} is attached already; give this one another name=, or detach() that delta"
        )
    return next(name for name in (f"delta_{number}" for number in range(2, len(taken) + 3)) if name not in taken)


def refuse_scaled(record: Record) -> None:
    """Refuses to save a delta with another scale than 1, because files do not hold the scale.

    Raises:
        StateError: if the scale is not 1.
    """
    if record.scale != 1:
        raise StateError(
            f"delta {record.name!r} has the scale {record.scale:g}, which is not saved: set scale = 1 to save it as it was "
            f"trained; for LoRA and BitFit, combine(model, {{{record.name!r}: {record.scale:g}}}).delta.save(folder) saves "
            "the scaled delta"
        )
