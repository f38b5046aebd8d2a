"""Saves a delta, in deltakit's own format or in another."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

from torch import Tensor

from deltakit.core import is_first, is_sharded, wait_for_all
from deltakit.delta import tensors
from deltakit.delta.changed_backbone import refuse_changed
from deltakit.delta.claims import refuse_scaled
from deltakit.delta.contents import DeltaContents
from deltakit.delta.running_statistics import held_of
from deltakit.delta.untrained import warn_untrained
from deltakit.files import WRITERS, delta_config, model_card, refuse_others, write_folder

Format = Literal["deltakit", "peft"]


def save(delta: DeltaContents, folder: str | PathLike[str], format: Format) -> Path:
    """Writes a delta into a folder. Under FSDP2 every process calls it, and the first one writes.

    Raises:
        DeltaError: as `Delta.save` does.
    """
    state = state_to_save(delta)
    sharded = any(map(is_sharded, delta.parameters()))
    if not sharded or is_first():
        write(delta, Path(folder), format, state)
    if sharded:
        wait_for_all()
    return Path(folder)


def state_to_save(delta: DeltaContents, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a delta's file, after all checks that do not need the folder.

    Args:
        given: the state dict of the backbone, if an engine has gathered it in this process alone.

    Raises:
        StateError: as `Delta.save` does.
    """
    attachment = delta._attachment
    refuse_scaled(attachment.record)
    held_of(attachment)
    refuse_changed(attachment, "saving")
    state = delta.state_dict() if given is None else tensors.state_of(attachment, given)
    tensors.refuse_absent(state)
    tensors.refuse_not_finite(attachment, state)
    warn_untrained(attachment, state)
    return state


def write(delta: DeltaContents, folder: Path, format: Format, state: Mapping[str, Tensor]) -> None:
    """Writes a delta with these tensors into a folder.

    Raises:
        CheckpointError: as `Delta.save` does.
    """
    attachment = delta._attachment
    refuse_others(folder, format)
    if format == "deltakit":
        config = delta_config(attachment, delta.num_parameters)
        write_folder(folder, config, state, model_card(config))
    else:
        WRITERS[format](folder, attachment, state)
