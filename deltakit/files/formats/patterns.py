"""Matches paths as options of other libraries do. Their patterns come from files, so they are bounded before they run."""

import re
from collections.abc import Callable
from pathlib import Path

import regex

from deltakit.errors import CheckpointError

_SECONDS, _LENGTH, _MOST_REPEATS = 2.0, 1_000, 99
"""The longest that matching may take, the longest pattern, and the largest count in braces. What people write takes
microseconds; `(a+)+$` can take years, and `(a{9999}){9999}` gigabytes."""


class Pattern:
    """A regular expression in a file of somebody else.

    Args:
        pattern: the expression.
        written: the part of it that is in the file.
        where: the file and the field, for error messages.

    Raises:
        CheckpointError: if it is no regular expression, or could take too much time or memory.
    """

    def __init__(self, pattern: str, written: str, where: Path) -> None:
        self._where = where
        counts = [int(number) for number in re.findall(r"\d+", "".join(re.findall(r"\{[^}]*\}", written))[:_LENGTH])]
        if len(written) > _LENGTH or max(counts, default=0) > _MOST_REPEATS or written.count("{") > 2:
            raise CheckpointError(
                f"{where}: a pattern is longer or repeats more than paths need; save or download it again"
            )
        try:
            # regex has a timeout, which Python's own module has not; and it knows more, which PEFT does not.
            re.compile(pattern)
            self._compiled = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, MemoryError, OverflowError) as error:
            raise CheckpointError(
                f"{where}: a pattern is no regular expression ({error}); save or download it again"
            ) from error

    def matches(self, path: str) -> bool:
        """Returns whether it matches a path from its start.

        Raises:
            CheckpointError: if that takes too long.
        """
        return self._found(self._compiled.match, path)

    def is_in(self, path: str) -> bool:
        """Returns whether it matches a part of a path.

        Raises:
            CheckpointError: if that takes too long.
        """
        return self._found(self._compiled.search, path)

    def _found(self, match: Callable[..., object], path: str) -> bool:
        try:
            return match(path, timeout=_SECONDS) is not None
        except (TimeoutError, MemoryError) as error:
            raise CheckpointError(
                f"{self._where}: a pattern takes too long to match; save or download it again"
            ) from error
