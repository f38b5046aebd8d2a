"""Names of repositories for deltas."""

from collections.abc import Mapping
from typing import Any


def create_hub_repo_name(
    root: str = "DeltaHub",
    dataset: str | None = None,
    delta_type: str | None = None,
    model_name_or_path: str | None = None,
    center_value_only_tags: list[Any] | None = None,
    center_key_value_tags: Mapping[str, Any] | None = None,
) -> str:
    """Returns a name for the repository of a delta, of what is known about it."""
    plain = [delta_type, model_name_or_path, dataset, *(center_value_only_tags or ())]
    named = [f"{key}-{value}" for key, value in (center_key_value_tags or {}).items()]
    words = [str(word).replace("/", "-") for word in plain if word is not None]
    return "_".join([root, *words, *named])
