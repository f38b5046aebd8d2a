"""The marks of training checkpoints that hold only what deltas train: one tensor for each delta, with its name in the key."""

from collections.abc import Iterable
from pathlib import Path

from deltakit.errors import CheckpointError
from deltakit.files.checkpoint import WEIGHTS_FILE
from deltakit.files.pickles import read_either, read_pickle

TRAINED_DELTA = "deltakit: attach this delta first: "
_PICKLE = "pytorch_model.bin"


def deltas_in(keys: Iterable[str], prefix: str = "") -> list[str]:
    """Returns the names of the deltas whose checkpoint has these keys; none of them if it is another checkpoint."""
    mark = prefix + TRAINED_DELTA
    return sorted(key.removeprefix(mark) for key in keys if key.startswith(mark))


def deltas_by_prefix(keys: Iterable[str]) -> dict[str, list[str]]:
    """Returns the same for each part of a module whose state dict it is, by the prefix of the part's keys."""
    found: dict[str, list[str]] = {}
    for prefix, mark, name in (key.partition(TRAINED_DELTA) for key in keys):
        if mark:
            found.setdefault(prefix, []).append(name)
    return {prefix: sorted(names) for prefix, names in found.items()}


def trained_deltas(place: Path) -> list[str]:
    """Returns the names of the deltas whose training checkpoint a folder or file is; none if it is another thing."""
    folder = place.parent if place.name == WEIGHTS_FILE else place
    try:
        pickled = read_pickle(place, values=False) if place.name == _PICKLE else None
        found = pickled or read_either(folder, WEIGHTS_FILE, _PICKLE, values=False)
    except CheckpointError:
        return []
    return deltas_in(found or ())
