"""Compares `delta_config.json` with the config in the safetensors file, of which it is a copy to be read by people."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltakit.errors import CheckpointError, warn
from deltakit.files.partial import is_saving
from deltakit.files.schema import DeltaConfig, read_config
from deltakit.files.seal import seal_in, seal_of

_MISSING = object()


def check_copy(copy: Path, config: DeltaConfig, original: Path, was_replaced: Callable[[], bool]) -> None:
    """Checks that the readable copy says what the config in the safetensors file says. It may be missing.

    A copy of another save is ignored while somebody saves, or after a save was killed. Otherwise a `DeltaWarning` says that
    it has no effect.

    Args:
        original: the safetensors file.
        was_replaced: whether a save has replaced that file since it was read.

    Raises:
        CheckpointError: if the copy is damaged, or was changed by hand.
    """
    if _is_copy(copy, config, original) or is_saving(copy.parent):
        return
    # A save that was at work a moment ago has now replaced the copy, or has been followed by another save.
    if _is_copy(copy, config, original) or was_replaced():
        return
    warn(
        f"{copy} belongs to another save than {original.name}, which holds the delta that was loaded; save the delta again to "
        "make the two agree"
    )


def _is_copy(copy: Path, config: DeltaConfig, original: Path) -> bool:
    if not copy.is_file():
        return True
    advice = f"delete it, because {original.name} holds the same, or save the delta again"
    try:
        found = read_config(copy.read_bytes(), copy)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or {advice}") from error
    if found["format_version"] > 1 and seal_of(found) != seal_in(found):
        raise CheckpointError(
            f"{copy} was changed by hand{_difference(found, config, original.name)}; changes in it have no effect: {advice}; "
            "for other options attach a new delta"
        )
    return seal_in(found) == seal_in(config)


def _difference(found: Any, config: Any, original: str, field: str = "") -> str:
    """Returns the first field in which the copy differs, with both values, as part of a message; "" if there is none."""
    if isinstance(found, dict) and isinstance(config, dict):
        for key in (*config, *found):
            here, there = found.get(key, _MISSING), config.get(key, _MISSING)
            if here != there:
                return _difference(here, there, original, f"{field}.{key}".removeprefix("."))
    elif isinstance(found, list) and isinstance(config, list) and len(found) == len(config):
        for index, (here, there) in enumerate(zip(found, config, strict=True)):
            if here != there:
                return _difference(here, there, original, f"{field}[{index}]")
    elif field:
        return f": {field} is {_short(found)} in it and {_short(config)} in {original}"
    return ""


def _short(value: object) -> str:
    text = "missing" if value is _MISSING else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
