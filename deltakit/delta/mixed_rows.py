"""`rows(model, names)`: each row of a batch gets its own delta, or none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from deltakit.core import Attachment, attachments_of, holding
from deltakit.delta.planning import original
from deltakit.errors import StateError


@contextmanager
def rows(backbone: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """The backbone, for the time of a `with` block with a delta of its own for each row of a batch.

    Args:
        names: for each row the name of an attached delta, or None for the bare backbone. What expands a batch, as beams
            do, takes the delta of its row along.

    Training works too: backward must be called inside the block where blocks are recomputed (gradient checkpointing). The
    first dimension of what targets take must be the batch.

    Raises:
        OptionError: if a name is unknown.
        StateError: if a delta that is named is switched off, works by the weight or stands on an expert; if any trains parts
            of the backbone whole or is merged; or if the backbone has attention with the batch second.
    """
    backbone = original(backbone)
    _refuse_batch_second(backbone)
    attached = attachments_of(backbone)
    for attachment in attached:
        _refuse_shared(attachment, named=attachment.record.name in names)
    with holding([attachment.record for attachment in attached], names):
        yield backbone


def _refuse_batch_second(backbone: nn.Module) -> None:
    # There the rows of a tensor are places in the text: each would get the delta of another row, without an error.
    for path, module in backbone.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise StateError(
                f"rows: {path or 'the backbone'} is attention with batch_first=False, so the batch is the second dimension of "
                "what its block takes; expected it first; build the backbone with batch_first=True"
            )


def _refuse_shared(attachment: Attachment, *, named: bool) -> None:
    record = attachment.record
    shared = f"rows: delta {record.name!r} "
    if record.fully_trained:
        raise StateError(f"{shared}fully trains {record.fully_trained[0]}, which all examples share; omit train=")
    if record.merged:
        raise StateError(f"{shared}is merged into the weights, which all rows share; unmerge() it")
    for site in attachment.sites if named else ():
        if "experts" in site.path.split("."):
            raise StateError(
                f"{shared}stands on an expert, {site.path}, which is given tokens of all rows together; leave experts out "
                "with exclude="
            )
        if site.module.weight_read is not None or not site.module.mixable:
            why = "patches the weight" if site.module.weight_read is not None else "acts on the whole batch"
            raise StateError(
                f"{shared}{why} at {site.path} ({type(site.module).__name__}), which all examples share; run such examples in "
                "a batch of their own"
            )
