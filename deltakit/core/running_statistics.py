"""Decides to which delta the buffers belong that forwards have changed.

A frozen backbone's forward changes buffers only because a delta is trained on it. So the change belongs to that delta: it is
removed at detach, comes back at attach, and is saved. The change is found by comparing values, whenever somebody asks for it:
a hook that looked for it would cost time in each forward.
"""

from collections.abc import Callable, Sequence

from torch import nn

from deltakit.core.buffer_ledger import buffer_at
from deltakit.core.paths import own_parameters, parent_of
from deltakit.core.record import Record, attachments_of


def notice_moved_buffers(backbone: nn.Module, record: Record) -> None:
    """Gives the buffers that forwards have changed to an active delta.

    It is the first that was trained since it was attached; if none was, the first that is trainable, else the first. The
    buffers are the backbone's own where nothing is frozen around them, or no delta is active.

    Args:
        record: an attached delta.
    """
    ledger = record.buffer_ledger
    moved = ledger.moved(backbone)
    if not moved:
        return
    attachments = attachments_of(backbone)
    attached = [attachment.record for attachment in attachments]
    if not any(other is record for other in attached):
        return
    taken = {id(buffer_at(backbone, name)) for other in attached for name in other.backbone_values}
    trained = {id(other.record) for other in attachments if other.version() != other.record.version}
    active = sorted(
        (other for other in attached if other.active),
        key=lambda other: (not (other.trainable and id(other) in trained), not other.trainable),
    )
    frozen = _frozen_around(backbone, attached)
    for name in moved:
        here = buffer_at(backbone, name)
        if here is None or id(here) in taken:
            continue
        if active and frozen(name):
            active[0].backbone_values[name] = ledger.own[name]
            saved = name not in ledger.unsaved and here.shape == ledger.own[name].shape
            (active[0].moved if saved else active[0].unsaved).add(name)
        else:
            ledger.accept(name, here)


def _frozen_around(backbone: nn.Module, attached: Sequence[Record]) -> Callable[[str], bool]:
    """Returns a function that says whether the parameters beside a buffer, or all where there are none, are frozen.

    Those that a delta fully trains count as frozen.
    """
    trained = {name for record in attached for name in record.backbone_values}
    beside, by_user = set(), set()
    for name, parameter in own_parameters(backbone):
        beside.add(parent_of(name))
        if parameter.requires_grad and name not in trained:
            by_user.add(parent_of(name))
    return lambda name: parent_of(name) not in by_user if parent_of(name) in beside else not by_user
