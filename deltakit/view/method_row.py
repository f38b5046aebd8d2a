"""What is known of one method, for tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltakit.core import Design


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """What is known of one method, in words.

    `merged`, `summed`, `mixed` and `identity` are "yes" or "no", and `merged` is "partly" if some targets have an update of a
    weight and others have not. They are "" where the method could not be tried.
    """

    name: str
    design: Design
    positions: Sequence[str]
    merged: str
    summed: str
    mixed: str
    identity: str
    source: str
    options: Mapping[str, Any]
    """The options that have a default, with it as plain data. Those that every method has are left out."""
    required: Sequence[str]
    """The options without a default."""
