"""Saves a delta, in deltakit's own format or in another."""

from os import PathLike
from pathlib import Path

from deltakit.core import is_first, is_sharded, wait_for_all
from deltakit.delta import tensors
from deltakit.delta.changed_backbone import refuse_changed
from deltakit.delta.claims import refuse_scaled
from deltakit.delta.contents import DeltaContents
from deltakit.delta.running_statistics import held_of
from deltakit.delta.untrained import warn_untrained
from deltakit.files import WRITERS, Written, delta_config, refuse_others


def save(delta: DeltaContents, folder: str | PathLike[str], format: Written) -> Path:
    """Writes a delta into a folder. Under FSDP2 every process calls it, and the first one writes.

    Raises:
        DeltaError: as `Delta.save` does.
    """
    attachment = delta._attachment
    refuse_scaled(attachment.record)
    held_of(attachment)
    refuse_changed(attachment, "saving")
    state = delta.state_dict()
    sharded = any(map(is_sharded, delta.parameters()))
    tensors.refuse_absent(state)
    tensors.refuse_not_finite(attachment, state)
    warn_untrained(attachment, state)
    if not sharded or is_first():
        refuse_others(Path(folder), format)
        WRITERS[format](Path(folder), attachment, state, delta_config(attachment, delta.num_parameters))
    if sharded:
        wait_for_all()
    return Path(folder)
