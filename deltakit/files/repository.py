"""The ids of Hub repositories, such as "user/name"."""

import re
from pathlib import Path

from torch import nn

_REPO_ID = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?")


def is_repository(name: str) -> bool:
    """Returns whether a text can be the id of a Hub repository."""
    return _REPO_ID.fullmatch(name) is not None


def hub_id(backbone: nn.Module) -> str | None:
    """Returns the name of a backbone if it is one of the Hub: a folder says nothing to others, and may name its user."""
    name = loaded_from(backbone)
    return name if name and is_repository(name) and not Path(name).exists() else None


def loaded_from(backbone: nn.Module) -> str | None:
    """Returns the folder or repository that transformers has loaded a backbone from; None if it has not."""
    name = getattr(getattr(backbone, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
