"""The files of a delta: `delta_config.json` describes it, `delta_model.safetensors` holds its tensors.

Their names differ from PEFT's on purpose: transformers' `from_pretrained` fails on a folder with an
`adapter_config.json` that is not PEFT's.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from deltakit.errors import CheckpointError

CONFIG_FILE = "delta_config.json"
TENSORS_FILE = "delta_model.safetensors"
CARD_FILE = "README.md"
FORMAT_VERSION = 1

_DESCRIBED = "description"
_CARD_MARK = "<!-- written by deltakit: remove this line to keep your own text -->"


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Writes the files of a delta into a folder, which is created if needed. A README.md that the user wrote is kept.

    Each file is written under a temporary name and then renamed, so an interrupted save leaves whole files. Two files cannot
    be renamed at once, so both name the description that the tensors belong to. After an interruption between the two, the
    folder holds one of the two deltas, or loading it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # All processes of a group may save to one folder. Each writes temporary files of its own, and the last one wins.
    own = uuid4().hex
    parts = {name: folder / f".{name}.{own}.partial" for name in (TENSORS_FILE, CONFIG_FILE, CARD_FILE)}
    described = _digest(config)
    text = json.dumps({**config, _DESCRIBED: described}, indent=2, ensure_ascii=False)
    present = folder / CARD_FILE
    try:
        # Only one entry, and not the usual "format": safetensors writes several in random order, and then one delta would
        # not always give the same bytes.
        save_file(plain, parts[TENSORS_FILE], metadata={_DESCRIBED: described})
        parts[CONFIG_FILE].write_text(f"{text}\n", encoding="utf-8")
        parts[CARD_FILE].write_text(f"{card.rstrip()}\n\n{_CARD_MARK}\n", encoding="utf-8")
        if present.exists() and _CARD_MARK not in present.read_text(encoding="utf-8"):
            parts.pop(CARD_FILE).unlink()
        for name, part in parts.items():
            part.replace(folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _digest(config: Mapping[str, Any]) -> str:
    """The digest of what says how tensors are read: methods, paths and structure.

    Two saves of one delta during training agree in it, so the newer tensors may stand beside the older config.
    """
    fingerprint = config["backbone"]["fingerprint"]
    described = [config["methods"], config["train"], fingerprint["class"], fingerprint["structure"]]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config and the tensors of the delta in a folder.

    Raises:
        CheckpointError: if one of the files is missing or damaged, or has a newer format version.
    """
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
            raise CheckpointError(
                f"{folder}: no delta in this folder: expected {name}, found {there}; pass the folder that delta.save wrote"
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {error}; save or download it again") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: found format version {version!r}, this deltakit reads versions up to {FORMAT_VERSION}; "
            "upgrade deltakit"
        )
    missing = sorted({"methods", "train", "backbone", "name"} - config.keys())
    if missing:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: it has no {', '.join(missing)}; save it again")
    try:
        with safetensors.safe_open(folder / TENSORS_FILE, "pt") as file:
            described = (file.metadata() or {}).get(_DESCRIBED)
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / TENSORS_FILE} is damaged or cut off: {error}; save or download it again"
        ) from error
    # Files of deltakit 0.1.0 and files of other programs have no description.
    if described is not None and described != config.get(_DESCRIBED):
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} and {TENSORS_FILE} come from two different saves: saving was interrupted, or one file "
            "was copied from elsewhere; save the delta again"
        )
    return config, tensors


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str) -> None:
    """Checks that a file has exactly the expected tensors, with the expected shapes.

    Args:
        where: the folder or repository, for the error message.

    Raises:
        CheckpointError: if tensors are missing, unknown or of another shape; the message lists the first five.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown in this delta" for name in found if name not in expected]
    problems += [
        f"{name}: the file has {tuple(tensor.shape)}, the backbone needs {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            f"{where}: {len(problems)} of its tensors do not fit: {shown}; load the backbone that the delta was trained on"
        )
