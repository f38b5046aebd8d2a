"""`adapter_config.json`: PEFT and AdapterHub have a config of this name."""

from pathlib import Path

from deltakit.errors import CheckpointError
from deltakit.files.schema import read_json

CONFIG = "adapter_config.json"


def is_adapterhub(folder: Path) -> bool:
    """Returns whether the config in a folder is AdapterHub's. PEFT's has a `peft_type`; a damaged one counts as PEFT's."""
    file = folder / CONFIG
    try:
        config = read_json(file.read_bytes(), file)
    except CheckpointError:
        return False
    return isinstance(config, dict) and "peft_type" not in config and isinstance(config.get("config"), dict)
