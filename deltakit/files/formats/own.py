"""deltakit's own format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltakit.core import Attachment, stored_extras
from deltakit.files.checkpoint import CARD_FILE, CONFIG_FILE, TENSORS_FILE, read_folder, write_folder
from deltakit.files.formats.format import Format
from deltakit.files.saved import Saved, Trained


def _recognises(place: Path) -> bool:
    # The readable copy of the config alone is no delta.
    return (place / TENSORS_FILE).is_file()


def _read(place: Path, _backbone: nn.Module | None, values: bool) -> Saved:
    config, tensors = read_folder(place, values=values)
    trained, base = config["train"], config["backbone"]
    extras, own = stored_extras(config.get("extras", {}), tensors)
    return Saved(
        config["methods"],
        own,
        Trained(trained["selectors"], trained["names"]),
        name=config["name"],
        base=base["id"],
        base_class=base["class"],
        fingerprint=base["fingerprint"],
        extras=extras,
    )


def _write(
    folder: Path, _attachment: Attachment, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str
) -> None:
    write_folder(folder, config, tensors, card)


FORMAT = Format(
    "deltakit",
    "deltas of its own",
    (TENSORS_FILE, CONFIG_FILE, CARD_FILE),
    recognises=_recognises,
    read=_read,
    write=_write,
)
