"""Matches paths as options of other libraries do. Their patterns come from files, so they are bounded before they run."""

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Generic, TypeVar

import regex

from deltakit.errors import CheckpointError

T = TypeVar("T")

_SECONDS, _LENGTH, _MOST_REPEATS, _MOST = 3.0, 1_000, 99, 10_000
"""The longest that all matching with one pattern or set may take, the longest pattern, the largest count in braces, and the
largest set. What people write takes microseconds; `(a+)+$` can take years, and `(a{9999}){9999}` gigabytes."""

_PLAIN = re.compile(r"[\w.]*")


class Pattern:
    """A regular expression in a file of somebody else.

    Args:
        pattern: the expression.
        written: the part of it that is in the file.
        where: the file and the field, for error messages.
        budget: how much time matching has left; patterns may share it.

    Raises:
        CheckpointError: if it is no regular expression, or could take too much time or memory.
    """

    def __init__(self, pattern: str, written: str, where: Path, budget: "Budget | None" = None) -> None:
        self._where, self._budget = where, budget or Budget()
        counts = [int(number) for number in re.findall(r"\d+", "".join(re.findall(r"\{[^}]*\}", written))[:_LENGTH])]
        if len(written) > _LENGTH or max(counts, default=0) > _MOST_REPEATS or written.count("{") > 2:
            raise CheckpointError(
                f"{where}: a pattern is longer or repeats more than paths need; save or download it again"
            )
        try:
            # regex has a timeout, which Python's own module has not. It also knows more, such as recursion: PEFT does not.
            if not _PLAIN.fullmatch(written):
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
        start = monotonic()
        try:
            found = match(path, timeout=self._budget.left()) is not None
        except (TimeoutError, MemoryError) as error:
            raise CheckpointError(
                f"{self._where}: a pattern takes too long to match; save or download it again"
            ) from error
        self._budget.spend(monotonic() - start)
        return found


class Budget:
    """The seconds that matching has left."""

    def __init__(self) -> None:
        self._seconds = _SECONDS

    def left(self) -> float:
        """Returns how many are left.

        Raises:
            TimeoutError: if none are.
        """
        if self._seconds <= 0:
            raise TimeoutError
        return self._seconds

    def spend(self, seconds: float) -> None:
        """Takes some away."""
        self._seconds -= seconds


class Patterns(Generic[T]):
    """A field of PEFT's configs that has values by patterns of paths, such as `rank_pattern`. The first that matches counts.

    Args:
        values: the values by their patterns, each the end of a path.
        where: the file and the field, for error messages.

    Raises:
        CheckpointError: if they are too many. What is wrong with one of them is said once a value is asked for.
    """

    def __init__(self, values: Mapping[str, T], where: Path) -> None:
        if len(values) > _MOST:
            raise CheckpointError(
                f"{where}: it has {len(values):,} patterns, and deltakit reads at most {_MOST:,}; save it again with patterns "
                "that match several modules"
            )
        self._given, self._where = values, where

    @cached_property
    def _values(self) -> list[tuple[Pattern, T]]:
        budget = Budget()
        form = r"(.*\.)?({})$"
        return [(Pattern(form.format(key), key, self._where, budget), value) for key, value in self._given.items()]

    def value_at(self, path: str, default: T) -> T:
        """Returns the value at a path.

        Raises:
            CheckpointError: if matching takes too long.
        """
        return next((value for pattern, value in self._values if pattern.matches(path)), default)
