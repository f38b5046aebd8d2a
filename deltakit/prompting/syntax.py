"""Parses the text of a template. Nothing in it is executed: a piece is a Python literal, read by `ast`.

    'A {"placeholder": "text_a"} review. It was {"mask"}.'

`{{` and `}}` are braces of the text.
"""

import ast
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from deltakit.errors import OptionError, did_you_mean
from deltakit.prompting.pieces import Field, Piece, Slot, Soft, Text

_MOST_CHARACTERS = 100_000
"""The longest template. One from a file of somebody else must not take hours."""
_LONGEST = 2_000
"""The most characters that one piece in braces may have."""
_MOST_TOKENS = 1_000
"""The most soft tokens that one piece may ask for."""


class _Source(NamedTuple):
    """A template, and the place of the piece that is read."""

    text: str
    start: int

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        """Raises the error for a column, which counts from 1."""
        column = self.start if at is None else at
        raise OptionError(f"Template: column {column + 1} of {shortened(self.text, column)}: {what}")


def shortened(text: str, column: int) -> str:
    """Returns the part of a template around a column, quoted.

    >>> shortened("It was {mask}.", 7)
    "'It was {mask}.'"
    """
    first, last = max(0, column - 40), column + 40
    return repr(("..." if first else "") + text[first:last] + ("..." if last < len(text) else ""))


def parse(text: str) -> list[Piece]:
    """Returns the pieces of a template.

    >>> parse('{"placeholder": "text_a"} It was {"mask"}.')[1:]
    [Text(text=' It was ', shortenable=False), Slot(column=33), Text(text='.', shortenable=False)]

    Raises:
        OptionError: if it is malformed. The message names the column, which counts from 1.
    """
    if len(text) > _MOST_CHARACTERS:
        raise OptionError(
            f"Template: it has {len(text):,} characters, and at most {_MOST_CHARACTERS:,} are read; shorten it"
        )
    pieces: list[Piece] = []
    plain, at = "", 0
    while at < len(text):
        char = text[at]
        if char in "{}" and text[at : at + 2] == 2 * char:
            plain, at = plain + char, at + 2
        elif char == "}":
            _Source(text, at).fail("found '}' without its '{'; write '}}' for a brace of the text")
        elif char == "{":
            if plain:
                pieces.append(Text(plain))
            end = _end(text, at)
            pieces.append(_read(_Source(text, at), text[at:end]))
            plain, at = "", end
        else:
            plain, at = plain + char, at + 1
    return [*pieces, Text(plain)] if plain else pieces


def _end(text: str, start: int) -> int:  # noqa: RET503
    """Returns the index behind the brace that closes the one at `start`."""
    depth, quote, at = 0, "", start
    while at < min(len(text), start + _LONGEST):
        char = text[at]
        if quote:
            at += char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if not depth:
                return at + 1
        at += 1
    ends = "the template ends" if at >= len(text) else f"there is no '}}' within {_LONGEST:,} characters"
    inside = f" inside a text that starts with {quote}" if quote else ""
    _Source(text, start).fail(
        f"the '{{' is not closed: {ends}{inside}; close it, or write '{{{{' for a brace of the text"
    )


def _read(source: _Source, written: str) -> Piece:
    """Returns the piece that a literal in braces stands for."""
    try:
        found = ast.parse(written, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        source.fail(f'expected a piece such as {{"mask"}} or {{"placeholder": "text_a"}}, found {written[:60]}')
    options: dict[str, Any] = {}
    if isinstance(found, ast.Set) and len(found.elts) == 1:
        options[_key(source, found.elts[0])] = None
    elif isinstance(found, ast.Dict) and found.keys:
        for key, value in zip(found.keys, found.values, strict=True):
            name = _key(source, key)
            if name in options:
                source.fail(f"{name!r} is there twice; write it once")
            options[name] = _value(source, name, value)
    else:
        source.fail(f"expected one name, or names with values, found {written[:60]}")
    kind = next((name for name in _KINDS if name in options), None)
    if kind is None:
        known, first = ", ".join(map(repr, _KINDS)), next(iter(options))
        source.fail(f"expected one of {known}, found {first!r}{did_you_mean(first, _KINDS)}")
    _check_names(source, kind, options)
    return _KINDS[kind](source, options)


def _key(source: _Source, node: ast.expr | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        source.fail('expected names in quotes, such as {"mask"}')
    return node.value


def _value(source: _Source, name: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        source.fail(
            f'{name!r} has an expression, and templates are not executed; for a function write "filter": "name", and '
            'pass Template(..., filters={"name": function})'
        )


def _check_names(source: _Source, kind: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name != kind and name not in _MAY_HAVE[kind]:
            may = ", ".join(map(repr, _MAY_HAVE[kind])) or "nothing else"
            source.fail(f"{kind!r} has no option {name!r}{did_you_mean(name, _MAY_HAVE[kind])}; it may have {may}")


def _typed(source: _Source, options: Mapping[str, Any], name: str, kind: type | tuple[type, ...], word: str) -> Any:
    value = options.get(name)
    if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        source.fail(f"expected {word} for {name!r}, found {value!r}")
    return value


def _text(source: _Source, options: Mapping[str, Any]) -> Piece:
    text = _typed(source, options, "text", str, "a text")
    if text is None:
        source.fail("expected a text for 'text', found none")
    return Text(text, bool(_typed(source, options, "shortenable", bool, "True or False")))


def _field(source: _Source, options: Mapping[str, Any]) -> Piece:
    meta = "meta" in options
    name = _typed(source, options, "meta" if meta else "placeholder", str, "the name of a field")
    if not name:
        source.fail('expected the name of a field, such as {"placeholder": "text_a"}, found none')
    short = _typed(source, options, "shortenable", bool, "True or False")
    word = "the name of a function in filters="
    named = [_typed(source, options, key, str, word) for key in ("filter", "post_processing") if key in options]
    if len(named) > 1:
        source.fail("'filter' and 'post_processing' are two names of one option; write one of them")
    return Field(name, meta, (not meta) if short is None else short, named[0] if named else None, source.start)


def _slot(source: _Source, options: Mapping[str, Any]) -> Piece:
    if options["mask"] is not None:
        source.fail(f'a slot has no value, found {options["mask"]!r}; write {{"mask"}}')
    return Slot(source.start)


def _soft(source: _Source, options: Mapping[str, Any]) -> Piece:
    words = _typed(source, options, "soft", str, "a text to start from, or None")
    count = _typed(source, options, "duplicate", int, "a number of tokens")
    if count is not None and not 1 <= count <= _MOST_TOKENS:
        source.fail(f"expected 1 to {_MOST_TOKENS:,} for 'duplicate', found {count}")
    if words == "" or (words and count is not None):
        what = "is empty" if words == "" else "says how many tokens there are, so it cannot have 'duplicate'"
        source.fail(f'the text of a soft piece {what}; write {{"soft"}} or {{"soft": None, "duplicate": 5}}')
    same = bool(_typed(source, options, "same", bool, "True or False"))
    if same and words:
        source.fail("'same' makes one vector of all, and a text starts one vector a token; omit one of the two")
    soft_id = _typed(source, options, "soft_id", (int, str), "a number or a name")
    return Soft(words or None, count or 1, same, soft_id, source.start)


_KINDS: dict[str, Callable[[_Source, Mapping[str, Any]], Piece]] = {
    "placeholder": _field,
    "meta": _field,
    "mask": _slot,
    "soft": _soft,
    "soft_id": _soft,
    "text": _text,
}
_OF_FIELDS = ("shortenable", "filter", "post_processing")
_MAY_HAVE = {
    "placeholder": _OF_FIELDS,
    "meta": _OF_FIELDS,
    "mask": (),
    "soft": ("duplicate", "same", "soft_id"),
    "soft_id": ("duplicate", "same"),
    "text": ("shortenable",),
}
