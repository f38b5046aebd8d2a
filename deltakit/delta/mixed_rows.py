"""Mixed-adapter batches, `rows(model, names)`: one delta (or none) per example of the batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from deltakit.core import Attachment, attachments_of, holding
from deltakit.delta.planning import original
from deltakit.delta.running_statistics import held_of, holding_word
from deltakit.errors import StateError


@contextmanager
def rows(backbone: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Gives each example of a batch its own delta, inside a `with` block, and returns the backbone.

    The batch must be the first dimension of the inputs of all targets. Beam search works: all beams of an example use its
    delta. Training works, too, but with gradient checkpointing call `backward` inside the block.

    Args:
        names: for each example the name of an attached delta, or None for the bare backbone.

    Raises:
        OptionError: if a name is unknown, or there are no names.
        StateError: if a named delta is not active, patches weights, acts on the whole batch or is on an expert; if an
            attached delta fully trains parts of the backbone or is merged; if the backbone is in a `rows` block already, is
            wrapped for distribution, or has attention with `batch_first=False`.
    """
    backbone = original(backbone)
    _refuse_batch_second(backbone)
    attached = attachments_of(backbone)
    for attachment in attached:
        _refuse_shared(attachment, named=attachment.record.name in names)
    with holding([attachment.record for attachment in attached], names):
        yield backbone


def _refuse_batch_second(backbone: nn.Module) -> None:
    # The first dimension of its tensors is the position in the text. Each position would silently get the delta of some
    # example.
    for path, module in backbone.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise StateError(
                f"rows: {path or 'the backbone'} is attention with batch_first=False, but the batch must be the first "
                "dimension; build the backbone with batch_first=True"
            )


def _refuse_shared(attachment: Attachment, *, named: bool) -> None:
    record = attachment.record
    shared = f"rows: delta {record.name!r} "
    for name in held_of(attachment)[:1]:
        raise StateError(
            f"{shared}{holding_word(attachment.backbone, name)}, which all examples share; detach() it, or train without "
            "train= and with such layers in eval()"
        )
    if record.merged:
        raise StateError(f"{shared}is merged into the weights, which all examples share; unmerge() it first")
    for site in attachment.sites if named else ():
        if "experts" in site.path.split("."):
            raise StateError(
                f"{shared}is on an expert, {site.path}, whose input mixes the tokens of all examples; leave experts out with "
                "exclude="
            )
        if site.module.weight_read is not None or not site.module.mixable:
            why = (
                "patches a weight, which all examples share,"
                if site.module.weight_read is not None
                else ("acts on the whole batch")
            )
            raise StateError(
                f"{shared}{why} at {site.path} ({site.module.word()}); run its examples in a batch of their own without rows()"
            )
