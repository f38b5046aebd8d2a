"""Matches paths as PEFT's options do. The patterns come from files of others, so they are bounded before they run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import regex

from deltakit.errors import CheckpointError

_SECONDS, _LENGTH, _MOST_REPEATS = 2.0, 1_000, 99
"""The longest that matching may take, the longest pattern, and the largest count in braces. What people write takes
microseconds; `(a+)+$` can take years, and `(a{9999}){9999}` gigabytes."""


def matching(patterns: Mapping[str, float], path: str, default: float, where: Path) -> float:
    """Returns the value of the first pattern that matches the end of a path."""
    found = (
        value for key, value in patterns.items() if matches(rf"(.*\.)?({key})$", key, path, where / "alpha_pattern")
    )
    return next(found, default)


def is_chosen(modules: str | Sequence[str], path: str, where: Path) -> bool:
    """Returns whether `feedforward_modules` has a module: a text is a pattern of paths, a list has ends of them."""
    if isinstance(modules, str):
        return matches(f"({modules})$", modules, path, where / "feedforward_modules")
    # Without a dot in between, unlike in `target_modules`.
    return any(path.endswith(name) for name in modules)


def matches(pattern: str, written: str, path: str, where: Path) -> bool:
    """Returns whether a pattern matches a path.

    Args:
        written: the part of the pattern that is in the file.
        where: the file and the field, for error messages.

    Raises:
        CheckpointError: if it is no regular expression, or takes too much time or memory.
    """
    counts = [int(number) for number in re.findall(r"\d+", "".join(re.findall(r"\{[^}]*\}", written))[:_LENGTH])]
    if len(written) > _LENGTH or max(counts, default=0) > _MOST_REPEATS or written.count("{") > 2:
        raise CheckpointError(
            f"{where}: a pattern is longer or repeats more than paths need; save or download it again"
        )
    try:
        # regex has a timeout, which Python's own module has not; and it knows more, which PEFT does not.
        re.compile(pattern)
        return regex.match(pattern, path, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise CheckpointError(f"{where}: a pattern takes too long to match; save or download it again") from error
    except (re.error, regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: a pattern is no regular expression ({error}); save or download it again"
        ) from error
