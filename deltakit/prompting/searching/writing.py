"""Writes templates back as text, with words in the places of their soft pieces."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deltakit.errors import OptionError
from deltakit.prompting.pieces import Field, Piece, Soft, Text
from deltakit.prompting.template import Template


def soft_places(template: Template, where: str) -> list[int]:
    """Returns the indices of a template's soft pieces, which a search replaces by words.

    Raises:
        OptionError: if there are none.
    """
    found = [place for place, piece in enumerate(template.pieces) if isinstance(piece, Soft)]
    if not found:
        raise OptionError(
            f'{where}: the template has no place for words that are searched; write {{"soft"}} there, such as '
            '\'{"placeholder": "text"} {"soft"} {"mask"}\''
        )
    return found


def written(pieces: Sequence[Piece], words: Mapping[int, str]) -> str:
    """Returns the text of a template.

    Args:
        words: what stands in the place of each soft piece, by its index. It may be empty.
    """
    found = ""
    for place, piece in enumerate(pieces):
        part = _escaped(words[place]) if place in words else _piece(piece)
        # Words and what follows them are apart. Fields and slots stand where the template has them.
        apart = place in words or (
            place - 1 in words and words[place - 1] and part[:1] not in (".", ",", "?", "!", ":", ";")
        )
        if part and apart and not found.endswith(" ") and not part.startswith(" "):
            found += " "
        found += part
    return found


def with_text(template: Template, text: str, backbone: nn.Module) -> Template:
    """Returns a template with another text, and the options of this one."""
    options: dict[str, Any] = {**template.to_dict(), "text": text}
    return Template(tokenizer=template.tokenizer, backbone=backbone, filters=template.filters, **options)


def _piece(piece: Piece) -> str:
    if isinstance(piece, Text):
        return _literal({"text": piece.text, "shortenable": True}) if piece.shortenable else _escaped(piece.text)
    if isinstance(piece, Field):
        options: dict[str, Any] = {"meta" if piece.meta else "placeholder": piece.name}
        if piece.shortenable is piece.meta:
            # Not the default of its kind.
            options["shortenable"] = piece.shortenable
        return _literal({**options, **({"filter": piece.filter} if piece.filter is not None else {})})
    return '{"mask"}'


def _literal(options: Mapping[str, Any]) -> str:
    parts = (f'"{name}": {json.dumps(value) if isinstance(value, str) else value}' for name, value in options.items())
    return f"{{{', '.join(parts)}}}"


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
