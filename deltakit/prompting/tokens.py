"""Tokenizes a rendered example, and says of each token where it comes from."""

from bisect import bisect_right
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


def tokenized(rendered: Rendered, tokenizer: Any) -> list[Token]:
    """Returns the tokens of a rendered example, the tokenizer's special ones included.

    Raises:
        OptionError: if the tokenizer does not keep a slot or a soft token as one token.
    """
    encoding = tokenizer(rendered.text, return_offsets_mapping=True, verbose=False)
    starts = [span.start for span in rendered.spans]
    types = encoding.get("token_type_ids") or [0] * len(encoding["input_ids"])
    rows = zip(encoding["input_ids"], encoding["offset_mapping"], encoding.sequence_ids(0), types, strict=True)
    # Where the sequence is None, the tokenizer added the token.
    found = [
        Token(one, "special", type_id=type_id)
        if sequence is None or not rendered.spans
        else _of_text(one, offsets, type_id, rendered, starts)
        for one, offsets, sequence, type_id in rows
    ]
    return _one_each(found, rendered, tokenizer)


def _of_text(one: int, offsets: tuple[int, int], type_id: int, rendered: Rendered, starts: list[int]) -> Token:
    start, end = offsets
    last = _span(rendered, starts, max(start, end - 1))
    # A token across a border holds text of both sides. It may be deleted if all of it may, but for spaces: the one ahead of
    # a field belongs to the template, and to the field's first token.
    while start < end - 1 and rendered.text[start].isspace():
        start += 1
    first = _span(rendered, starts, start)
    return Token(one, last.kind, last.number, first.shortenable and last.shortenable, type_id)


def _span(rendered: Rendered, starts: list[int], at: int) -> Span:
    return rendered.spans[max(0, bisect_right(starts, at) - 1)]


def _one_each(tokens: list[Token], rendered: Rendered, tokenizer: Any) -> list[Token]:
    """Returns the tokens with one for each slot and each soft token.

    Raises:
        OptionError: if one has none, or several.
    """
    expected = [(span.kind, span.number) for span in rendered.spans if span.kind in ("slot", "soft")]
    # Metaspace may put an empty piece ahead of a special token, at the same place in the text.
    markers = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    kept = [token for token in tokens if token.kind not in ("slot", "soft") or token.id in markers]
    if [(token.kind, token.number) for token in kept if token.kind in ("slot", "soft")] != expected:
        shown = tokenizer.convert_ids_to_tokens([token.id for token in tokens])
        raise OptionError(
            f"Template: {type(tokenizer).__name__} does not keep each slot and soft token as one token: {shown[:40]}; "
            "register the mask token as a special token: tokenizer.add_special_tokens({'mask_token': ...})"
        )
    return kept
