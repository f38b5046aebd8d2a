"""The two files of a delta: `delta_config.json` says what it is, `delta_model.safetensors` holds its tensors.

Their names differ from PEFT's on purpose: an `adapter_config.json` that is not PEFT's breaks transformers'
`from_pretrained` on that folder.
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
    """Writes a delta's files; each is complete under its name or not there. A model card of the user's own is kept.

    Two files cannot be replaced at once. So both say which description the tensors belong to, and the tensors are replaced
    first: what an interruption leaves is one of the two deltas, or an error when it is loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Every process of a group may save to one folder: each writes files of its own, and the last one stays.
    own = uuid4().hex
    parts = {name: folder / f".{name}.{own}.partial" for name in (TENSORS_FILE, CONFIG_FILE, CARD_FILE)}
    described = _digest(config)
    text = json.dumps({**config, _DESCRIBED: described}, indent=2, ensure_ascii=False)
    present = folder / CARD_FILE
    try:
        # One entry and no more, not even the usual "format": safetensors writes several in any order, and the same delta
        # would not give the same bytes.
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
    """Of what says how tensors are to be read: methods, places and structure. Two saves of one delta in training agree, so
    that the tensors of the later one go with the config of the earlier one too."""
    fingerprint = config["backbone"]["fingerprint"]
    described = [config["methods"], config["train"], fingerprint["class"], fingerprint["structure"]]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of the delta in a folder.

    Raises:
        CheckpointError: if one of the files is missing or damaged, or of a newer format.
    """
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
            raise CheckpointError(f"{folder} holds no delta: expected {name}, found {there}; was it saved by deltakit?")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {error}; save or download it again") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: format version {version!r}, this deltakit reads up to {FORMAT_VERSION}; "
            "was it written by a newer deltakit?"
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
    # Files of deltakit 0.1.0, and tensors written by other programs, do not say it.
    if described is not None and described != config.get(_DESCRIBED):
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} and {TENSORS_FILE} are of two different saves: saving was interrupted, or one was "
            "copied from elsewhere; save the delta again"
        )
    return config, tensors


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str) -> None:
    """Raises `CheckpointError` unless both hold the same names with the same shapes; reports all that differ."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} belongs to nothing in this delta" for name in found if name not in expected]
    problems += [
        f"{name}: the file has {tuple(tensor.shape)}, the backbone needs {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            f"{where}: {len(problems)} of its tensors do not fit: {shown}; was it trained on another backbone?"
        )
