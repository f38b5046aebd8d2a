"""The pieces that a template's text consists of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Text of the template itself."""

    text: str
    shortenable: bool = False


@dataclass(frozen=True)
class Field:
    """A place for a value of the example, `example[name]`.

    `meta` says whether it may also stand in `example["meta"]`. `filter` is the name of the function that the value goes
    through, or None. `column` is where the piece starts in the template.
    """

    name: str
    meta: bool = False
    shortenable: bool = True
    filter: str | None = None
    column: int = 0


@dataclass(frozen=True)
class Slot:
    """A place where the model predicts a word."""

    column: int = 0


@dataclass(frozen=True)
class Soft:
    """Trained vectors instead of words.

    Args:
        words: their start values are the embeddings of these words, one vector a token; None for other words.
        count: how many tokens there are, if no words say it.
        same: whether all of them are one vector.
        soft_id: pieces with one id share their vectors.
    """

    words: str | None = None
    count: int = 1
    same: bool = False
    soft_id: int | str | None = None
    column: int = 0


Piece = Text | Field | Slot | Soft
