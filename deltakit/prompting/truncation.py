"""Truncates an example by deleting tokens of shortenable fields. Template text, slots and special tokens always stay."""

from collections.abc import Sequence
from typing import Literal

from deltakit.errors import OptionError
from deltakit.prompting.tokens import Token

Truncate = Literal["tail", "head", "balanced"]


def deleted(tokens: Sequence[Token], max_length: int | None, truncate: Truncate) -> set[int]:
    """Returns the places of the tokens that are deleted so that at most `max_length` are left.

    Args:
        truncate: "tail" deletes the last shortenable tokens of the example, "head" the first ones, "balanced" the last ones
            of the field that is the longest at the time.

    Raises:
        OptionError: if all the others are more than `max_length`.
    """
    excess = len(tokens) - max_length if max_length is not None else 0
    if excess <= 0:
        return set()
    places = [place for place, token in enumerate(tokens) if token.shortenable]
    if len(places) < excess:
        raise OptionError(
            f"Template: {len(tokens) - len(places)} tokens of this example may not be truncated, and max_length is "
            f"{max_length}; write a shorter template, pass a larger max_length, or make fields shortenable"
        )
    if truncate == "balanced":
        return _balanced(tokens, places, excess)
    return set(places[:excess] if truncate == "head" else places[len(places) - excess :])


def _balanced(tokens: Sequence[Token], places: Sequence[int], excess: int) -> set[int]:
    fields: dict[int, list[int]] = {}
    for place in places:
        fields.setdefault(tokens[place].number, []).append(place)
    # The length that fields are cut to: the largest one with which enough is deleted.
    low, high = 0, max(map(len, fields.values()))
    while low < high:
        middle = (low + high + 1) // 2
        enough = sum(max(0, len(own) - middle) for own in fields.values()) >= excess
        low, high = (middle, high) if enough else (low, middle - 1)
    cut = [place for own in fields.values() for place in own[low:]]
    # The last cut may be one too many in some fields: the first fields keep theirs.
    spare = len(cut) - excess
    kept = [own[low] for own in fields.values() if len(own) > low][:spare]
    return set(cut) - set(kept)
