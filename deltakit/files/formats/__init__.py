"""The formats of deltas: one file for each format of others. What is in a folder says which one reads it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import nn

from deltakit.errors import CheckpointError
from deltakit.files.checkpoint import CARD_FILE, CONFIG_FILE, TENSORS_FILE, read_folder
from deltakit.files.formats import peft
from deltakit.files.saved import Saved, Trained


class Format(Protocol):
    """What the file of a format has."""

    FILES: tuple[str, ...]
    """The names of the files that it reads."""

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Returns whether a folder has this format."""

    @staticmethod
    def read(folder: Path, backbone: nn.Module) -> Saved:
        """Returns what a folder of this format holds, for a backbone.

        Raises:
            CheckpointError: if a file is missing or damaged, or holds what deltakit does not have.
        """


FORMATS: tuple[Format, ...] = (peft,)  # type: ignore[assignment]
_BY_NAME = {"peft": peft}
WRITERS = {"peft": peft.write}
"""What writes the formats of others, by the name that `Delta.save(format=)` has for it."""
FILES = (CONFIG_FILE, TENSORS_FILE, CARD_FILE, *(name for kind in FORMATS for name in kind.FILES))
"""The files that are downloaded: all that some format reads."""

# Each: a file, and what has it.
_OTHERS = {
    "pytorch_lora_weights.safetensors": "a LoRA of diffusers",
    "pytorch_lora_weights.bin": "a LoRA of diffusers",
    "pytorch_adapter.bin": "an adapter of AdapterHub",
    "adapter.safetensors": "an adapter of AdapterHub",
    "head_config.json": "a prediction head of AdapterHub",
    "model.safetensors": "a whole model",
    "model.safetensors.index.json": "a whole model",
    "pytorch_model.bin": "a whole model, or a delta of OpenDelta",
}


def read_saved(folder: Path, backbone: nn.Module) -> Saved:
    """Returns the delta in a folder, of whichever format.

    Raises:
        CheckpointError: as `Format.read`; and if the folder has no format that deltakit reads, or several. The message says
            what is there.
    """
    there = _formats_in(folder)
    if len(there) > 1:
        raise CheckpointError(
            f"{folder}: here are deltas of two formats, {' and '.join(there)}, which may differ; keep the files of one of them"
        )
    if there == ["deltakit"]:
        config, tensors = read_folder(folder)
        train = Trained(config["train"]["selectors"], config["train"]["names"])
        return Saved(config["methods"], tensors, train, config["name"], config["backbone"]["fingerprint"])
    for kind in FORMATS:
        if kind.recognises(folder):
            return kind.read(folder, backbone)
    raise CheckpointError(f"{folder}: {no_delta(sorted(entry.name for entry in folder.iterdir()))}")


def refuse_others(folder: Path, format: str) -> None:
    """Refuses to write into a folder that has a delta of another format: whoever reads it could get the old one.

    Raises:
        CheckpointError: if there is one, or the folder cannot be read.
    """
    try:
        others = [other for other in _formats_in(folder) if other != format]
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be saved there: {error}; save to another folder") from error
    if others:
        raise CheckpointError(
            f"{folder}: a delta in the format {others[0]!r} is here already, and would stay beside the new one; save to "
            "another folder, or remove it first"
        )


def _formats_in(folder: Path) -> list[str]:
    ours = (folder / TENSORS_FILE).is_file() or (folder / CONFIG_FILE).is_file()
    return ["deltakit"] * ours + [name for name, kind in _BY_NAME.items() if kind.recognises(folder)]


def holds_delta(folder: Path) -> bool:
    """Returns whether a folder has a delta in a format that deltakit reads."""
    # The readable copy of the config alone is no delta.
    return (folder / TENSORS_FILE).is_file() or any(kind.recognises(folder) for kind in FORMATS)


def no_delta(names: Iterable[str]) -> str:
    """Returns what to say of a folder or repository that holds no delta in a format that deltakit reads."""
    there = list(names)
    known = next((_OTHERS[name] for name in there if name in _OTHERS), "")
    if known:
        return f"this is {known}, which deltakit does not read; it reads deltas of its own, and LoRA and IA3 of PEFT"
    more = f" and {len(there) - 10} more" if len(there) > 10 else ""
    return (
        f"there is no delta here: expected {TENSORS_FILE}, or {peft.CONFIG} and {peft.TENSORS} of PEFT, found "
        f"{', '.join(there[:10]) or 'nothing'}{more}; pass the folder or repository that a delta was saved to"
    )
