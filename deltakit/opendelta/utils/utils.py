"""OpenDelta's tests of names, under the module name that they had in earlier versions."""

import re
from collections.abc import Sequence

from deltakit.opendelta.utils.name_based_addressing import endswith_in, superstring_in

__all__ = ["endswith_in", "regex_match", "substring_in", "superstring_in"]


def substring_in(str_a: str, list_b: Sequence[str]) -> bool:
    """Returns whether one of the texts is in a text."""
    return any(text in str_a for text in list_b)


def regex_match(str_a: str, list_b: Sequence[str]) -> bool:
    """Returns whether the first match of one of the regular expressions is all of a text."""
    found = (re.search(pattern, str_a) for pattern in list_b)
    return any(match is not None and match.group() == str_a for match in found)
