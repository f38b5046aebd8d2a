"""Options that may differ between targets: one value for all of them, or a dictionary of selectors and values."""

from collections.abc import Collection, Mapping
from typing import TypeVar, Union

from deltakit.errors import OptionError

T = TypeVar("T")

# mypy takes `T | Mapping[str, T]` for a value.
PerTarget = Union[T, Mapping[str, T]]  # noqa: UP007
"""An option such as `r=8` or `r={"layers.{0-5}": 4, "*": 8}`. Of several selectors that match, the first one counts."""


def values_of(option: PerTarget[T]) -> Collection[T]:
    """Returns all values that an option has."""
    return option.values() if isinstance(option, Mapping) else (option,)


def one_value(option: PerTarget[T]) -> T:
    """Returns the value of an option that has one for all targets.

    Raises:
        OptionError: if there are selectors, which only attaching and planning know how to read.
    """
    if isinstance(option, Mapping):
        raise OptionError(
            f"found selectors where one value is expected: {dict(option)!r}; pass the method to attach() or plan()"
        )
    return option
