"""Leaves a delta in the backbone's weights for good, and nothing else of it."""

from deltakit.core import Attachment, buffer_at, notice_moved_buffers, one_walk
from deltakit.delta.full_training import fully_trained_tensors
from deltakit.delta.interrupted import finished
from deltakit.delta.putting import take_all
from deltakit.files import backbone_identity


@finished
def unload(attachment: Attachment) -> None:
    """Detaches a merged delta without restoring what it changed."""
    backbone, record = attachment.backbone, attachment.record
    if record.backbone_values:
        # The handle keeps the values, so that it can be saved.
        record.trained_values = {
            name: tensor.detach().clone() for name, tensor in fully_trained_tensors(attachment).items()
        }
    notice_moved_buffers(backbone, record)
    for name in record.moved:
        found = buffer_at(backbone, name)
        if found is not None:
            record.buffer_ledger.accept(name, found)
    record.unloaded = record.unloaded or backbone_identity(backbone, record)
    # Not active first: while it is attached, it must not apply on top of what the weights have already.
    record.active = False
    record.backbone_values = {}
    record.set_merged({})
    with one_walk(backbone):
        take_all(attachment)
