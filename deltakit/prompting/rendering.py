"""Renders an example to one string, and remembers which part of it came from where.

The string is tokenized in one go. Pieces that are tokenized one by one get spurious tokens at their borders: after a field
that ends in "down", a piece "." becomes "▁" and "." where the text "down." has only "." (as OpenPrompt's T5 wrapper printed).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from deltakit.errors import OptionError, did_you_mean
from deltakit.prompting.markers import Marker, Markers
from deltakit.prompting.pieces import Field, Piece, Slot, Soft, Text

SpanKind = Literal["template", "field", "slot", "soft"]


class Span(NamedTuple):
    """Where a part of the template is in the string. `number` is that of the slot, of the soft vector, or of the piece."""

    start: int
    end: int
    kind: SpanKind
    shortenable: bool
    number: int


@dataclass
class Rendered:
    """The string and its spans, in their order."""

    text: str = ""
    spans: list[Span] = field(default_factory=list)

    def add(self, text: str, kind: SpanKind, shortenable: bool, number: int) -> None:
        """Adds a part."""
        start = len(self.text)
        self.text += text
        if text:
            self.spans.append(Span(start, len(self.text), kind, shortenable, number))

    def strip_end(self) -> None:
        """Removes spaces at the end.

        A special token takes no part in the word around it: byte-level BPE would make a token of the space alone ("Ġ"), and
        Unigram, too ("▁"). Language models were trained on texts without such tokens.
        """
        kept = len(self.text.rstrip(" "))
        self.text = self.text[:kept]
        self.spans = [span._replace(end=min(span.end, kept)) for span in self.spans if span.start < kept]


def render(
    pieces: Sequence[Piece],
    example: Mapping[str, Any],
    markers: Markers,
    soft: Mapping[int, Sequence[int]],
    filters: Mapping[str, Any],
) -> Rendered:
    """Returns the string of an example.

    Args:
        soft: for each soft piece, by its index, the numbers of its vectors.

    Raises:
        OptionError: if the example lacks a field, or its value is no text.
    """
    found, slot = Rendered(), 0
    for index, piece in enumerate(pieces):
        if isinstance(piece, Text):
            found.add(piece.text, "template", piece.shortenable, index)
        elif isinstance(piece, Field):
            found.add(value_of(example, piece, filters), "field", piece.shortenable, index)
        else:
            found.strip_end()
            if isinstance(piece, Soft):
                for number in soft[index]:
                    found.add(_text(markers.soft), "soft", False, number)
            elif isinstance(piece, Slot) and markers.slots:
                found.add(markers.slots[slot].text, "slot", False, slot)
                slot += 1
    return found


def _text(marker: Marker | None) -> str:
    return "" if marker is None else marker.text


def value_of(example: Mapping[str, Any], piece: Field, filters: Mapping[str, Any]) -> str:
    """Returns the text that stands in the place of a field.

    Raises:
        OptionError: if the example lacks it, or it is no text.
    """
    where = f"Template: the field {piece.name!r} (column {piece.column + 1})"
    meta = example.get("meta") if piece.meta else None
    holder = meta if isinstance(meta, Mapping) and piece.name in meta else example
    if piece.name not in holder:
        known = [str(name) for name in example]
        hint = did_you_mean(piece.name, known) or (
            "; with the Trainer pass remove_unused_columns=False, because it removes what forward() does not take"
        )
        raise OptionError(f"{where}: the example has no such field, only {', '.join(known[:10]) or 'none'}{hint}")
    value = holder[piece.name]
    if isinstance(value, str) and piece.filter is not None:
        value = filters[piece.filter](value)
    if not isinstance(value, str):
        after = f" after the filter {piece.filter!r}" if piece.filter is not None else ""
        raise OptionError(
            f"{where}: expected a text{after}, found {type(value).__name__}; pass a text, such as str(value)"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{where}: its text has half of a surrogate pair at {error.start}, which no tokenizer takes; decode the text "
            "again with errors='replace'"
        ) from error
    return value
