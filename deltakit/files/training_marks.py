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


def trained_deltas(place: Path) -> list[str]:
    """Returns the names of the deltas whose training checkpoint a folder or file is; none if it is another thing."""
    folder = place.parent if place.name == WEIGHTS_FILE else place
    try:
        pickled = read_pickle(place, values=False) if place.name == _PICKLE else None
        found = pickled or read_either(folder, WEIGHTS_FILE, _PICKLE, values=False)
    except CheckpointError:
        return []
    return deltas_in(found or ())
