"""Decides to which delta the buffers belong that forwards have changed.

A frozen backbone's forward changes buffers only because a delta is trained on it. So the change belongs to that delta: it is
removed at detach, comes back at attach, and is saved. The change is found by comparing values, whenever somebody asks for it:
a hook that looked for it would cost time in each forward.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from deltakit.core.buffer_ledger import buffer_at, is_below, relative
from deltakit.core.paths import join, own_parameters, parent_of
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
    attachments = [attachment for attachment in attachments_of(backbone) if attachment.backbone is backbone]
    attached = [attachment.record for attachment in attachments]
    if not any(other is record for other in attached):
        return
    trained = {id(other.record) for other in attachments if other.version() != other.record.version}
    active = sorted(
        (other for other in attached if other.active),
        key=lambda other: (not (other.trainable and id(other) in trained), not other.trainable),
    )
    for name, here, of_delta in _whose(backbone, "", attached, moved):
        if of_delta:
            active[0].backbone_values[name] = ledger.own[name]
            saved = name not in ledger.unsaved and here.shape == ledger.own[name].shape
            (active[0].moved if saved else active[0].unsaved).add(name)
        else:
            ledger.accept(name, here)


def moved_in(module: nn.Module, path: str, attached: Sequence[Record]) -> list[str]:
    """Returns the names of the buffers in a part of a backbone that forwards have moved because of a delta.

    Those that a delta has already are not among them.

    Args:
        path: the path of the module in the backbone.
        attached: the records of all deltas that are attached to the backbone.
    """
    moved = attached[0].buffer_ledger.moved(module, path)
    return [name for name, _, of_delta in _whose(module, path, attached, moved) if of_delta] if moved else []


def _whose(
    module: nn.Module, path: str, attached: Sequence[Record], moved: Sequence[str]
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yields buffers that have moved and that no delta has yet, with their names, and whether they belong to a delta."""
    here_of = {name: buffer_at(module, relative(name, path)) for name in moved}
    held = {name for other in attached for name in other.backbone_values if is_below(name, path)}
    taken = {id(buffer_at(module, relative(name, path))) for name in held}
    frozen = _frozen_around(module, path, attached)
    active = any(other.active for other in attached)
    for name, here in here_of.items():
        if here is not None and id(here) not in taken:
            yield name, here, active and frozen(name)


def _frozen_around(module: nn.Module, path: str, attached: Sequence[Record]) -> Callable[[str], bool]:
    """Returns a function that says whether the parameters beside a buffer, or all where there are none, are frozen.

    Those that a delta fully trains count as frozen.
    """
    trained = {name for record in attached for name in record.backbone_values}
    # A module in the backbone does not know the others, but how their parameters were when a delta was last attached.
    flags = dict(attached[0].grad_ledger.ours) if path else {}
    beside = set()
    for name, parameter in own_parameters(module):
        beside.add(parent_of(join(path, name)))
        flags[join(path, name)] = parameter.requires_grad
    by_user = {parent_of(name) for name, trains in flags.items() if trains and name not in trained}
    return lambda name: parent_of(name) not in by_user if parent_of(name) in beside else not by_user
