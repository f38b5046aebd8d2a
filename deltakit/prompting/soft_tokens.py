"""Numbers the soft tokens of a template, and says what their vectors start from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from deltakit.errors import OptionError
from deltakit.prompting.backbone_facts import refuse_slow
from deltakit.prompting.pieces import Piece, Soft, Text

_STAND_IN = "."
"""Stands in for what only an example has. Tokenizers do not join it with words."""


class SoftTokens(NamedTuple):
    """`numbers`: for each soft piece, by its index, the numbers of its vectors. `starts`: for each vector the id of the word
    that it starts from, or None."""

    numbers: dict[int, tuple[int, ...]]
    starts: tuple[int | None, ...]


def numbered(pieces: Sequence[Piece], tokenizer: Any) -> SoftTokens:
    """Returns the numbers of a template's soft tokens.

    Raises:
        OptionError: if pieces with one `soft_id` have different words or numbers of tokens, words have no tokens, or the
            tokenizer no offsets.
    """
    numbers: dict[int, tuple[int, ...]] = {}
    starts: list[int | None] = []
    shared: dict[int | str, tuple[int, ...]] = {}
    for index, piece in enumerate(pieces):
        if not isinstance(piece, Soft):
            continue
        group = (
            [p for p in pieces if isinstance(p, Soft) and p.soft_id == piece.soft_id]
            if piece.soft_id is not None
            else [piece]
        )
        if piece.soft_id is None or piece.soft_id not in shared:
            own = _starts(group, pieces, tokenizer)
            first = len(starts)
            starts += own[:1] if any(p.same for p in group) else own
            found = tuple(range(first, len(starts)))
            found = found * (len(own) // len(found))
            if piece.soft_id is not None:
                shared[piece.soft_id] = found
        numbers[index] = found if piece.soft_id is None else shared[piece.soft_id]
    return SoftTokens(numbers, tuple(starts))


def _starts(group: Sequence[Soft], pieces: Sequence[Piece], tokenizer: Any) -> list[int | None]:
    words = sorted({piece.words for piece in group if piece.words is not None})
    if len(words) > 1:
        raise OptionError(
            f"Template: soft_id {group[0].soft_id!r} has different words, {words[0]!r} and {words[1]!r}; write them once, and "
            f'{{"soft_id": {group[0].soft_id!r}}} elsewhere'
        )
    counts = sorted({piece.count for piece in group if piece.count > 1})
    if len(counts) > 1 or (counts and words):
        said = (
            f"{counts[0]} and {counts[1]} tokens"
            if len(counts) > 1
            else f"{counts[0]} tokens and the words {words[0]!r}"
        )
        raise OptionError(
            f"Template: soft_id {group[0].soft_id!r} has {said}; write them once, and "
            f'{{"soft_id": {group[0].soft_id!r}}} elsewhere'
        )
    if not words:
        return [None] * (counts or [1])[0]
    first = next(place for place, piece in enumerate(pieces) if any(piece is p and p.words for p in group))
    ids = _as_text(words[0], "".join(map(_text_of, pieces[:first])), tokenizer)
    if not ids:
        raise OptionError(
            f"Template: column {group[0].column + 1}: the words {words[0]!r} of a soft piece have no tokens; write other words"
        )
    return list(ids)


def _text_of(piece: Piece) -> str:
    if isinstance(piece, Text):
        return piece.text
    return (piece.words if isinstance(piece, Soft) else None) or _STAND_IN


def _as_text(words: str, ahead: str, tokenizer: Any) -> list[int]:
    """Returns the ids that words have behind other text: for byte-level BPE a word behind a space is another token."""
    refuse_slow(tokenizer)
    space = " " if " " in (ahead[-1:], words[:1]) else ""
    for before in (ahead.rstrip(" "), _STAND_IN if ahead.strip(" ") else ""):
        text = before + space + words.strip(" ")
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if not before:
            return list(encoding["input_ids"])
        rows = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        found = [(one, start) for one, (start, end) in rows if end > len(before)]
        # A token that holds text of both sides is none of the words. Then something else stands ahead of them.
        if found and found[0][1] >= len(before):
            return [one for one, _ in found]
    return list(tokenizer(space + words.strip(" "), add_special_tokens=False)["input_ids"])
