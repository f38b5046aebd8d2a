"""Deltas beside others at the same targets, under names that are chosen for them, as in OpenDelta."""

from torch import nn

from deltakit.core import records_of
from deltakit.delta.attaching import AUTOMATIC_NAME
from deltakit.delta.claims import free_name
from deltakit.delta.handle import Delta


def spare_name(backbone: nn.Module) -> str | None:
    """Returns a name for a delta that stands beside others with its method; None if there are no others."""
    others = records_of(backbone)
    return free_name(AUTOMATIC_NAME, others, chosen=False) if others else None


def attach_beside(delta: Delta) -> None:
    """Attaches a delta again, under another name if its own is taken, also beside others with its method.

    Raises:
        StateError: as `Delta.attach` otherwise does.
    """
    record, others = delta._record, records_of(delta.backbone)
    before = record.name, record.named
    record.name, record.named = free_name(record.name, others, chosen=False), record.named or bool(others)
    try:
        delta.attach()
    except BaseException:
        record.name, record.named = before
        raise
