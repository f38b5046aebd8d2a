"""Converts a saved delta to another format. It needs the structure of the backbone, and not its weights."""

from os import PathLike
from pathlib import Path

from torch import nn

from deltakit.delta.loading import unfilled
from deltakit.delta.planning import original
from deltakit.delta.saving import write
from deltakit.files import Written, check_tensors, read_saved


def convert(place: Path, target: str | PathLike[str], backbone: nn.Module, *, to: Written, where: str) -> Path:
    """Writes a saved delta to a folder in another format, and returns the folder.

    Args:
        place: the folder or file of the delta.
        target: the folder to write to.
        backbone: the model that the delta is for, which may be on the meta device. A delta in deltakit's own format then
            does not say which weights it was trained on, only which structure.
        where: the folder, file or repository, for error messages.

    Raises:
        CheckpointError: if the delta cannot be read, does not fit the backbone, or does not exist in that format.
        BackboneMismatch: if the backbone differs from the one that the delta was trained on.
    """
    backbone = original(backbone)
    saved = read_saved(place, backbone, where)
    delta, tensors = unfilled(saved, backbone, where, advice="name that one as the model (--model)")
    check_tensors(tensors, delta.state_dict(), own=delta._record.fully_trained, where=where)
    folder = Path(target)
    write(delta, folder, to, tensors)
    return folder
