"""OpenDelta's tests of names against lists of names."""

from collections.abc import Sequence

from deltakit.opendelta.matching import matches


def endswith_in(str_a: str, list_b: Sequence[str]) -> bool:
    """Returns whether a path ends with one of the names, or of the regular expressions behind `[r]`."""
    return any(matches(str_a, name) for name in list_b)


def endswith_in_normal(str_a: str, list_b: Sequence[str]) -> bool:
    """Returns whether a path ends with one of the names."""
    return any(matches(str_a, name) for name in list_b if not name.startswith("[r]"))


def endswith_in_regex(str_a: str, list_b: Sequence[str]) -> bool:
    """Returns whether a path ends with a match of one of the regular expressions."""
    return any(matches(str_a, f"[r]{name.removeprefix('[r]')}") for name in list_b)


def is_child_key(str_a: str, list_b: Sequence[str]) -> bool:
    """Returns whether a path lies below one of the paths."""
    return any(str_a != path and str_a.startswith(f"{path}.") for path in list_b)


def superstring_in(str_a: str, list_b: Sequence[str]) -> bool:
    """Returns whether a text is in one of the texts."""
    return any(str_a in text for text in list_b)
