"""The files of a delta. `delta_model.safetensors` holds its tensors and its config; `delta_config.json` is a readable copy.

Two files cannot be replaced at once. So one file alone is the truth: whoever reads while somebody saves, or after a save was
killed, gets one of the two deltas and never a mixture.

Their names differ from PEFT's on purpose: transformers' `from_pretrained` fails on a folder with an
`adapter_config.json` that is not PEFT's.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from deltakit.errors import CheckpointError
from deltakit.files.partial import partial_folder
from deltakit.files.readable_copy import check_copy
from deltakit.files.schema import DeltaConfig, read_config
from deltakit.files.seal import check_seal, sealed
from deltakit.files.tensor_file import identity, read_whole

CONFIG_FILE = "delta_config.json"
TENSORS_FILE = "delta_model.safetensors"
CARD_FILE = "README.md"
DELTA_FILES = (TENSORS_FILE, CONFIG_FILE)
"""The files without the model card."""
WEIGHTS_FILE = "model.safetensors"
"""Where transformers and accelerate look for the weights of a checkpoint."""

_ENTRY, _FIRST_ENTRY = "delta", "description"
_CARD_MARK = b"<!-- written by deltakit: remove this line to keep your own text -->"


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Writes the files of a delta into a folder, which is created if needed.

    All files are written beside their places first, and then renamed. So after an error, a crash or a loss of power the folder
    holds either the delta that was there before or the new one.

    Raises:
        CheckpointError: if the files cannot be written, or an option of a method is not plain data.
    """
    plain = plain_tensors(tensors)
    whole = sealed(config, plain, folder)

    def fill(own: Path) -> list[str]:
        # Only one entry, and not the usual "format": safetensors writes several in random order, and then one delta would not
        # always give the same bytes.
        write_tensors(own / TENSORS_FILE, plain, {_ENTRY: json.dumps(whole)})
        (own / CONFIG_FILE).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        return [TENSORS_FILE, CONFIG_FILE]

    write_files(folder, fill, card)


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes plain tensors into a folder, which is created if needed, as the weights of a training framework's checkpoint.

    Raises:
        CheckpointError: if the file cannot be written.
    """

    def fill(own: Path) -> list[str]:
        # transformers refuses to load a file without this entry.
        write_tensors(own / WEIGHTS_FILE, tensors, {"format": "pt"})
        return [WEIGHTS_FILE]

    write_files(folder, fill, None)


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies on the CPU that share no memory, as safetensors needs them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file of plain tensors."""
    file.touch()
    mode = file.stat().st_mode & 0o777
    save_file(dict(tensors), file, metadata=dict(metadata))
    # safetensors makes a file that only its owner can read. It gets what the user's umask says, as the others do.
    file.chmod(mode)


def write_files(folder: Path, fill: Callable[[Path], Sequence[str]], card: str | None) -> None:
    """Puts files and a model card into a folder, which is created if needed, in the place of those that have their names.

    Args:
        fill: writes the files into the folder that it gets, and returns their names.
        card: the text of README.md, or None for none. One that the user wrote is kept.

    Raises:
        CheckpointError: if they cannot be written. What was there before is unchanged then.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder}: this is a file, and a delta is saved to a folder; pass another path")
    try:
        with partial_folder(folder) as own:
            names = list(fill(own))
            if card is not None and _is_ours(folder / CARD_FILE):
                (own / CARD_FILE).write_bytes(card.rstrip().encode() + b"\n\n" + _CARD_MARK + b"\n")
                names.append(CARD_FILE)
            for name in names:
                _settle(own / name, folder / name)
            for name in names:
                (own / name).replace(folder / name)
    except (OSError, UnicodeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the delta could not be saved: {error}; what was saved there before is unchanged; free some space, "
            "allow writing there, or save to another folder"
        ) from error


def _is_ours(card: Path) -> bool:
    return not card.is_file() or _CARD_MARK in card.read_bytes()


def _settle(part: Path, place: Path) -> None:
    """Makes sure that a file can be renamed to its place, and that it is on the disk before it is."""
    if place.is_dir():
        raise IsADirectoryError(f"{place.name} is a folder there")
    # Otherwise a loss of power after the rename can leave an empty file in the place of the old delta.
    with part.open("rb+") as file:
        os.fsync(file.fileno())


def read_folder(folder: Path, *, values: bool = True) -> tuple[DeltaConfig, dict[str, Tensor]]:
    """Returns the config and the tensors of the delta in a folder.

    Args:
        values: whether the tensors' values are needed; else they are on the meta device, and not compared with the seal.

    Raises:
        CheckpointError: if one of the files is missing, damaged or changed by hand, or has a newer format version.
    """
    config_file, tensors_file = folder / CONFIG_FILE, folder / TENSORS_FILE
    try:
        if not tensors_file.is_file():
            raise _absent(folder, TENSORS_FILE)
        metadata, tensors, before = read_whole(tensors_file, values)
        if _ENTRY not in metadata:
            return _first_format(folder, metadata), tensors
        config = read_config(metadata[_ENTRY], tensors_file)
        check_seal(config, tensors if values else None, tensors_file)
        check_copy(config_file, config, tensors_file, lambda: identity(tensors_file) != before)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the delta could not be read: {error}; allow reading it, or copy it again"
        ) from error
    return config, tensors


def _first_format(folder: Path, metadata: Mapping[str, str]) -> DeltaConfig:
    """Returns the config of a delta that deltakit 0.1 saved, whose safetensors file does not hold it."""
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise _absent(folder, CONFIG_FILE)
    config = read_config(config_file.read_bytes(), config_file)
    described = metadata.get(_FIRST_ENTRY)
    if config["format_version"] > 1 or (described is not None and described != config.get(_FIRST_ENTRY)):
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} and {TENSORS_FILE} come from two different saves: saving was interrupted, or one file "
            "was copied from elsewhere; save the delta again"
        )
    return config


def _absent(folder: Path, name: str) -> CheckpointError:
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    return CheckpointError(
        f"{folder}: no delta in this folder: expected {name}, found {there}; pass the folder that delta.save wrote"
    )
