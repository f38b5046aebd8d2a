"""Tokenizes a rendered example, and says of each token where it comes from."""

from bisect import bisect_right
from collections.abc import Container, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from deltakit.errors import OptionError
from deltakit.prompting.rendering import Rendered, Span

TokenKind = Literal["template", "field", "slot", "soft", "special"]


class Token(NamedTuple):
    """One token. `number` is that of its slot, soft vector or piece; `type_id` its token type."""

    id: int
    kind: TokenKind
    number: int = -1
    shortenable: bool = False
    type_id: int = 0


def tokenized(rendered: Sequence[Rendered], tokenizer: Any) -> list[list[Token]]:
    """Returns the tokens of each rendered example, the tokenizer's special ones included.

    Raises:
        OptionError: if the tokenizer does not keep a slot or a soft token as one token.
    """
    # One call for all of them: each call costs as much as the tokens of a short text.
    encoding = tokenizer([one.text for one in rendered], return_offsets_mapping=True, verbose=False)
    types = encoding.get("token_type_ids") or [[0] * len(ids) for ids in encoding["input_ids"]]
    # Metaspace may put an empty piece ahead of a special token, at the same place in the text.
    markers = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    found = []
    for number, (one, ids, offsets, own) in enumerate(
        zip(rendered, encoding["input_ids"], encoding["offset_mapping"], types, strict=True)
    ):
        tokens = _classified(one, zip(ids, offsets, encoding.sequence_ids(number), own, strict=True))
        found.append(_one_each(tokens, one, tokenizer, markers))
    return found


def _classified(rendered: Rendered, rows: Iterable[tuple[int, tuple[int, int], int | None, int]]) -> list[Token]:
    found, spans = [], rendered.spans
    starts = [span.start for span in spans]
    current = spans[0] if spans else None
    for one, (start, end), sequence, type_id in rows:
        # Where the sequence is None, the tokenizer added the token.
        if sequence is None or current is None:
            found.append(Token(one, "special", type_id=type_id))
            continue
        if not current.start <= start < end <= current.end:
            current = _span(rendered, starts, max(start, end - 1))
        shortenable = current.shortenable and _first(rendered, starts, current, start, end).shortenable
        found.append(Token(one, current.kind, current.number, shortenable, type_id))
    return found


def _first(rendered: Rendered, starts: list[int], last: Span, start: int, end: int) -> Span:
    """Returns the span that a token starts in, spaces apart."""
    # A token across a border holds text of both sides. It may be deleted if all of it may, but for spaces: the one ahead of
    # a field belongs to the template, and to the field's first token.
    while start < last.start and start < end - 1 and rendered.text[start].isspace():
        start += 1
    return last if last.start <= start else _span(rendered, starts, start)


def _span(rendered: Rendered, starts: list[int], at: int) -> Span:
    return rendered.spans[max(0, bisect_right(starts, at) - 1)]


def _one_each(tokens: list[Token], rendered: Rendered, tokenizer: Any, markers: Container[int]) -> list[Token]:
    """Returns the tokens with one for each slot and each soft token.

    Args:
        markers: the ids of special tokens.

    Raises:
        OptionError: if one has none, or several.
    """
    expected = [(span.kind, span.number) for span in rendered.spans if span.kind in ("slot", "soft")]
    kept = [token for token in tokens if token.kind not in ("slot", "soft") or token.id in markers]
    if [(token.kind, token.number) for token in kept if token.kind in ("slot", "soft")] != expected:
        shown = tokenizer.convert_ids_to_tokens([token.id for token in tokens])
        raise OptionError(
            f"Template: {type(tokenizer).__name__} does not keep each slot and soft token as one token: {shown[:40]}; "
            "register the mask token as a special token: tokenizer.add_special_tokens({'mask_token': ...})"
        )
    return kept
