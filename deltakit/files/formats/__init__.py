"""The formats of deltas: one file or folder for each. What is in a folder says which one reads it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from torch import nn

from deltakit.errors import CheckpointError
from deltakit.files.checkpoint import TENSORS_FILE
from deltakit.files.formats import adapterhub, images, opendelta, own, peft
from deltakit.files.formats.format import Format
from deltakit.files.saved import Saved
from deltakit.files.training_marks import trained_deltas

_ALL = (own.FORMAT, peft.FORMAT, adapterhub.FORMAT, opendelta.FORMAT, images.DIFFUSERS, images.KOHYA)
FORMATS = {kind.name: kind for kind in _ALL}
Written = Literal["deltakit", "peft", "diffusers"]
"""The names of the formats that have a writer."""
WRITERS = {kind.name: kind.write for kind in FORMATS.values() if kind.write is not None}
FILES = tuple(name for kind in FORMATS.values() for name in kind.files)
"""The files that are downloaded from a repository: all that some format reads."""

TELLING = frozenset(FILES) - {"README.md", "config.json"}
"""Files that only deltas have."""

_MODEL = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Each: a file, and what has it.
_OTHERS = {
    "adapter_fusion_config.json": "an AdapterFusion of AdapterHub",
    "head_config.json": "a prediction head of AdapterHub",
    **dict.fromkeys(_WEIGHTS, "a whole model"),
}


def read_saved(place: Path, backbone: nn.Module | None, where: str, *, values: bool = True) -> Saved:
    """Returns the delta in a folder or file, of whichever format.

    Args:
        backbone: the model that it is for, or None to learn what the files alone say.
        where: what the user calls the place: a path, or a Hub repository. Errors name that.
        values: whether the values of its tensors are needed; else they are on the meta device.

    Raises:
        CheckpointError: as `Reader` says; and as `format_of`.
    """
    try:
        return format_of(place).read(place, backbone, values)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(place), where)) from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # What no check of a reader expected: files of others may hold anything.
        raise CheckpointError(
            f"{where} is damaged, or no delta of this backbone: {type(error).__name__}: {str(error)[:200]}; load the backbone "
            "that it was trained on, or save or download it again"
        ) from error


def format_of(place: Path) -> Format:
    """Returns the format of a folder or file.

    Raises:
        CheckpointError: if it has no format that deltakit reads, or several. The message says what is there.
    """
    found = formats_in(place)
    if len(found) > 1:
        names = " and ".join(kind.name for kind in found)
        raise CheckpointError(
            f"{place}: here are deltas of two formats, {names}, which may differ; keep the files of one of them"
        )
    if not found:
        raise CheckpointError(f"{place}: {_why_none(place)}")
    return found[0]


def formats_in(place: Path) -> list[Format]:
    """Returns the formats that a folder or file has; usually one."""
    return [kind for kind in FORMATS.values() if kind.recognises(place)]


def deltas_below(folder: Path) -> list[tuple[str, Format]]:
    """Returns the paths of the folders in a folder, and in these, that hold a delta, sorted, each with its format."""
    # `save_pretrained` puts several deltas of a part of a model into part/name.
    entries = sorted(entry for pattern in ("*", "*/*") for entry in folder.glob(pattern) if entry.is_dir())
    return [(entry.relative_to(folder).as_posix(), found[0]) for entry in entries if (found := formats_in(entry))]


def refuse_others(folder: Path, format: str) -> None:
    """Refuses to write into a folder that has a delta of another format: whoever reads it could get the old one.

    Nor is an adapter of PEFT written into the folder of a model, which transformers would then load with the adapter.

    Raises:
        CheckpointError: if there is one, or the folder cannot be read.
    """
    try:
        has_model = (folder / _MODEL).is_file() and any((folder / name).is_file() for name in _WEIGHTS)
        others = [kind.name for kind in formats_in(folder) if kind.name != format]
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be saved there: {error}; save to another folder") from error
    if others:
        raise CheckpointError(
            f"{folder}: a delta in the format {others[0]!r} is here already, and would stay beside the new one; save to "
            "another folder, or remove it first"
        )
    if format == peft.FORMAT.name and has_model:
        raise CheckpointError(
            f"{folder}: a model is here, and transformers' from_pretrained would load it with the adapter from then on; save "
            "to another folder"
        )


def _why_none(place: Path) -> str:
    """Returns what to say of a folder or file on this machine that holds no delta in a format that deltakit reads."""
    if peft.is_alone(place):
        return (
            f"this is an adapter of PEFT without its {peft.CONFIG}, which says its scale; put that file beside it, and pass "
            "the folder"
        )
    trained = trained_deltas(place)
    if trained:
        return (
            f"this is a training checkpoint of the delta {', '.join(map(repr, trained))}; attach it to the backbone as it "
            "was, and load this with what saved it (load_state of accelerate, resume_from_checkpoint of Trainer); then "
            "delta.save(folder) writes what dk.load reads"
        )
    below = [name for name, _ in deltas_below(place)]
    if below:
        more = f" and {len(below) - 10} more" if len(below) > 10 else ""
        return (
            f"there is no delta here, but in folders below: {', '.join(below[:10])}{more}; pass one of them, such as "
            f"{place / below[0]}"
        )
    return no_delta(_names_in(place))


def no_delta(names: Iterable[str], *, listed: bool = False) -> str:
    """Returns what to say of a folder or repository that holds no delta in a format that deltakit reads.

    Args:
        listed: whether the names are all files of a repository, those in folders, too.
    """
    there = list(names)
    folders = sorted({name.rpartition("/")[0] for name in there if name.rpartition("/")[2] in TELLING} - {""})
    if folders:
        more = f" and {len(folders) - 10} more" if len(folders) > 10 else ""
        return (
            f"there is no delta here, but in folders below: {', '.join(folders[:10])}{more}; pass one of them as the "
            f"subfolder, such as {folders[0]!r}"
        )
    known = next((_OTHERS[name] for name in there if name in _OTHERS), "")
    if known:
        reads = ", ".join(kind.reads for kind in FORMATS.values())
        return f"this is {known}, which deltakit does not read; it reads {reads}"
    more = f" and {len(there) - 10} more" if len(there) > 10 else ""
    file = next((name for name in there if name.endswith(".safetensors")), "")
    how = "its name as the subfolder" if listed else "the path of that file"
    advice = f"; if {file} is a LoRA of kohya or LyCORIS, pass {how}" if file else ""
    return (
        f"there is no delta here: expected {TENSORS_FILE}, or the files of another library, found "
        f"{', '.join(there[:10]) or 'nothing'}{more}; pass the folder or repository that a delta was saved to"
        f"{advice}"
    )


def _names_in(place: Path) -> list[str]:
    return sorted(entry.name for entry in place.iterdir()) if place.is_dir() else [place.name]
