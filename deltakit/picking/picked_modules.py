"""`Selection`: the modules that were picked, and the selectors that select exactly these."""

from collections import Counter
from collections.abc import Sequence
from typing import overload

from deltakit.core import name_of, parent_of
from deltakit.errors import printable


class Selection(Sequence[str]):
    """Modules that were picked.

    It is a sequence of its selectors, so it can stand wherever selectors can: `dk.LoRA(at=selection)`.

    >>> picked = Selection(["encoder.0.q", "encoder.1.q"], ["encoder/q"])
    >>> picked
    Selection of 2 modules (2 q): at="encoder/q"
    >>> list(picked), picked.names, picked.line
    (['encoder/q'], ('encoder.0.q', 'encoder.1.q'), 'dk.LoRA(at="encoder/q")')

    Args:
        names: the paths of the modules.
        selectors: selectors of exactly these modules.
    """

    def __init__(self, names: Sequence[str] = (), selectors: Sequence[str] = ()) -> None:
        self._names, self._selectors = tuple(names), tuple(selectors)

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the modules, in the order of the model."""
        return self._names

    @property
    def selectors(self) -> tuple[str, ...]:
        """The fewest and shortest selectors found that select exactly these modules."""
        return self._selectors

    @property
    def line(self) -> str:
        """A line of Python to paste: a LoRA on these modules; "" if there are none."""
        return f"dk.LoRA({_argument(self.selectors)})" if self.selectors else ""

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        return self.selectors[place]

    def __len__(self) -> int:
        return len(self.selectors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return (self.names, self.selectors) == (other.names, other.selectors)

    def __hash__(self) -> int:
        return hash((self.names, self.selectors))

    def __repr__(self) -> str:
        if not self.names:
            return "Selection of no module"
        return f"Selection of {summary(self.names)}: {_argument(self.selectors)}"


def summary(names: Sequence[str]) -> str:
    """Returns how many modules there are, and how many of each name.

    >>> summary(["layers.0.q", "layers.1.q", "head", "layers.1"])
    '4 modules (2 q, 1 head, 1 layers.*)'
    """
    kinds = Counter(_kind(name) for name in names)
    most = kinds.most_common()
    shown = ", ".join(f"{count} {name}" for name, count in most[:4])
    more = f" and {len(most) - 4} more names" if len(most) > 4 else ""
    return f"{len(names)} module{'s' if len(names) != 1 else ''} ({shown}{more})"


def _kind(name: str) -> str:
    last = name_of(name)
    around = name_of(parent_of(name))
    return printable(f"{around}.*" if last.isdecimal() and around else last)


def _argument(selectors: Sequence[str]) -> str:
    """Returns selectors as the argument `at=` in Python."""
    texts = [_quoted(selector) for selector in selectors]
    return f"at={texts[0]}" if len(texts) == 1 else f"at=[{', '.join(texts)}]"


def _quoted(text: str) -> str:
    return f'"{text}"' if text.isprintable() and not {'"', "\\"} & set(text) else repr(text)
