"""What a template makes of an example, for people to read."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from deltakit.errors import printable

_COLORS = {"template": 36, "field": 0, "slot": 35, "soft": 33, "special": 90}
"""The terminal's colors: cyan, default, magenta, yellow, gray."""
_BACKGROUNDS = {
    "template": "80,160,220",
    "field": "",
    "slot": "220,80,180",
    "soft": "220,170,60",
    "special": "140,140,140",
}
_WORDS = {"template": "template", "field": "field", "slot": "slot «»", "soft": "soft <>", "special": "special"}
_CUT = 9
"""The terminal's code for text that is struck out."""


@dataclass(frozen=True)
class ExplainedToken:
    """A token as text, its kind ("template", "field", "slot", "soft" or "special"), and whether truncation deletes it."""

    text: str
    kind: str
    cut: bool


@dataclass(frozen=True, repr=False)
class Explanation:
    """The tokens of an example, each with its kind, and whether truncation deletes it.

    `print` shows it, in colors in a terminal; a notebook shows it as HTML. Deleted tokens are struck out: ~token~.
    """

    tokens: Sequence[ExplainedToken]
    max_length: int | None
    truncate: str

    @property
    def summary(self) -> str:
        """How many tokens there are, and how many are deleted."""
        cut = sum(token.cut for token in self.tokens)
        limit = (
            f", max_length {self.max_length}, {cut} deleted ({self.truncate})" if self.max_length is not None else ""
        )
        return f"{len(self.tokens) - cut} tokens{limit}"

    def _marked(self) -> list[tuple[str, ExplainedToken]]:
        """The tokens as they are printed, each with its marks."""
        return [(_with_marks(token), token) for token in self.tokens]

    def __repr__(self) -> str:
        return (
            f"{' '.join(text for text, _ in self._marked())}\n{' · '.join(_WORDS.values())} · ~deleted~\n{self.summary}"
        )

    def __str__(self) -> str:
        if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
            return repr(self)
        words = [_colored(text, token.kind, token.cut) for text, token in self._marked()]
        kinds = [_colored(word, kind, False) for kind, word in _WORDS.items()]
        return f"{' '.join(words)}\n{' · '.join(kinds)} · ~deleted~\n{self.summary}"

    def _repr_html_(self) -> str:
        tokens = " ".join(_html(token.text, token.kind, token.cut) for token in self.tokens)
        kinds = " ".join(_html(kind, kind, False) for kind in _WORDS)
        return f'<div style="line-height:1.9">{tokens}<br><small>{kinds} · {escape(self.summary)}</small></div>'


def _with_marks(token: ExplainedToken) -> str:
    around = {"slot": "«{}»", "soft": "<{}>"}.get(token.kind, "{}").format(printable(token.text))
    return f"~{around}~" if token.cut else around


def _colored(text: str, kind: str, cut: bool) -> str:
    codes = f"{_COLORS[kind]};{_CUT}" if cut else _COLORS[kind]
    return f"\x1b[{codes}m{text}\x1b[0m"


def _html(text: str, kind: str, cut: bool) -> str:
    color = _BACKGROUNDS[kind]
    style = (f"background:rgba({color},.3);" if color else "") + (
        "text-decoration:line-through;opacity:.6;" if cut else ""
    )
    # Isolated, so that a mark for right-to-left text does not turn the tokens around it.
    return f'<bdi title="{kind}" style="padding:0 .2em;border-radius:.2em;{style}">{escape(printable(text))}</bdi>'
