"""Finds what an earlier `save_pretrained` left in a folder and the next one would not replace."""

import re
from collections.abc import Collection
from pathlib import Path

from deltakit.errors import CheckpointError
from deltakit.files import deltas_below, formats_in, read_saved, refuse_others

# The names that `attach` gives to deltas without one.
_UNNAMED = re.compile(r"delta(_\d+)?")


def refuse_earlier(folder: Path, names: Collection[str], part: str = "") -> None:
    """Refuses a folder with deltas that would stay beside those that are saved there now: readers could get the old ones.

    Args:
        names: of the deltas that are saved. A single one is written into the folder, several into a folder each in it.
        part: the folder in the folder that stands for it, if the deltas are on a part of the saved model.

    Raises:
        CheckpointError: if there is such a delta, or the folder cannot be read.
    """
    if part and names and formats_in(folder):
        raise _earlier(folder, [])
    folder, several = folder / part, len(names) > 1
    for place in (folder / name for name in names) if several else [folder] * len(names):
        refuse_others(place, "deltakit")
    if not folder.is_dir():
        return
    old = [f"{name}/" for name in _saved_by_name(folder) if not (several and name in names)]
    if old or (len(names) != 1 and formats_in(folder)):
        raise _earlier(folder, old)


def _earlier(folder: Path, old: Collection[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: a delta of an earlier save is here{': ' * bool(old)}{', '.join(old)}, and would stay beside what is saved "
        "now; remove it, or save to another folder"
    )


def _saved_by_name(folder: Path) -> list[str]:
    """Returns the folders in a folder that a save of several deltas made: each has the name of its delta."""
    found = []
    for below, kind in deltas_below(folder):
        if kind.name == "deltakit" and "/" not in below:
            try:
                name = read_saved(folder / below, None, str(folder / below), values=False).name
            except CheckpointError:
                # What cannot be read is not taken for the delta by mistake: loading it fails, too.
                continue
            if below == name or (name is None and _UNNAMED.fullmatch(below)):
                found.append(below)
    return found
