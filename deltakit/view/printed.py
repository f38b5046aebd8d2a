"""What all results that are tables share: text with aligned columns, HTML for notebooks, and data for JSON.

The HTML has no colour for text, so it has the page's own, light or dark. Bars have a figure beside them.
"""

import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from rich.cells import cell_len

from deltakit.errors import OptionError, encodable, printable

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR = 10
"""The length of a full bar in cells."""
_INDENT = "      "
_FILL = "rgba(56,139,253,.45)"
"""Half transparent: text on it has enough contrast on light and dark pages."""


class Table(NamedTuple):
    """Rows of cells under their heads.

    `right` are the indices of columns of figures. In `selectors`, the index of a column whose cells are selectors, a cell may
    have several lines; `below` puts this column, the last one, below the rows where lines are too long. `bars` has a number
    from 0 to 1 for each row, which is drawn in front of it, or None.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    selectors: int | None = None
    bars: Sequence[float | None] | None = None
    below: bool = False


class Printed:
    """A result that is displayed as lines and tables."""

    width: int | None = None
    """The cells that a line of a table should have at most; None for any number. A line that cannot be so short is longer."""

    @abstractmethod
    def _parts(self) -> Iterable[str | Table]:
        """Returns its lines and tables, in their order."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns its contents as data that `json.dumps` takes."""

    def _shown(self) -> Iterator[str | Table]:
        """Its lines, escaped, and its tables without the columns that no row has anything in."""
        for part in self._parts():
            yield printable(part) if isinstance(part, str) else _without_empty(part)

    def __str__(self) -> str:
        plain = "utf" not in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
        lines: list[str] = []
        for part in self._shown():
            lines += [encodable(part)] if isinstance(part, str) else _fitted(part, self.width, plain=plain)
        return "\n".join(lines)

    __repr__ = __str__

    def html(self) -> str:
        """Returns it as one HTML element without scripts."""
        parts = [f"<div>{escape(part)}</div>" if isinstance(part, str) else _html(part) for part in self._shown()]
        return f'<div style="font-family:ui-monospace,monospace;font-size:13px;line-height:1.5">{"".join(parts)}</div>'

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self.html()}


def check_width(function: str, width: int | None) -> None:
    """Checks the option `width` of a function that returns one of these.

    Raises:
        OptionError: if it is below 1.
    """
    if width is not None and width < 1:
        raise OptionError(f"{function}(width={width}): expected at least 1; omit it for lines of any length")


def _bar(value: float | None, *, plain: bool) -> str:
    if value is None:
        return ""
    eighths = round(min(max(value, 0.0), 1.0) * _BAR * 8)
    if plain:
        return "#" * round(eighths / 8)
    return (_EIGHTHS[-1] * (eighths // 8) + _EIGHTHS[eighths % 8]).strip()


def _without_empty(table: Table) -> Table:
    kept = [place for place in range(len(table.heads)) if not table.rows or any(row[place] for row in table.rows)]
    return table._replace(
        heads=[table.heads[place] for place in kept],
        rows=[[row[place] for place in kept] for row in table.rows],
        right=[new for new, place in enumerate(kept) if place in table.right],
        selectors=kept.index(table.selectors) if table.selectors in kept else None,
    )


def _fitted(table: Table, width: int | None, *, plain: bool) -> list[str]:
    """The lines of a table. Where they are too long, bars go first, and then the starts of the last column's texts."""
    lines = _text(table, plain=plain)
    if width is None or max(map(cell_len, lines)) <= width:
        return lines
    if table.below and table.selectors is not None:
        return _with_selectors_below(table, plain=plain)
    lines = _text(table._replace(bars=None), plain=plain)
    longest = max(cell_len(cell) for row in table.rows for cell in row[-1].split("\n"))
    # At least one letter is left of each.
    room = max(4, longest - (max(map(cell_len, lines)) - width))
    rows = [
        [*row[:-1], "\n".join(_end_of(cell, room, plain=plain) for cell in row[-1].split("\n"))] for row in table.rows
    ]
    return _text(table._replace(rows=rows, bars=None), plain=plain)


def _with_selectors_below(table: Table, *, plain: bool) -> list[str]:
    # They are not cut, so that they can be copied.
    bare = table._replace(
        heads=table.heads[:-1],
        rows=[row[:-1] for row in table.rows],
        right=[p for p in table.right if p < len(table.heads) - 1],
    )
    head, *lines = _text(bare._replace(selectors=None, bars=None), plain=plain)
    found = [head]
    for line, row in zip(lines, table.rows, strict=True):
        found += [line, *(_INDENT + encodable(printable(cell)) for cell in row[-1].split("\n"))]
    return found


def _end_of(text: str, room: int, *, plain: bool) -> str:
    if cell_len(text) <= room:
        return text
    mark = "..." if plain else "…"
    while cell_len(text) > room - len(mark):
        text = text[1:]
    return mark + text


def _text(table: Table, *, plain: bool) -> list[str]:
    found: list[list[str]] = []
    bars = list(table.bars) if table.bars is not None else []
    for number, row in enumerate((table.heads, *table.rows)):
        cells = [cell.split("\n") if place == table.selectors else [cell] for place, cell in enumerate(row)]
        if bars:
            cells.insert(0, [_bar(bars[number - 1], plain=plain) if number else ""])
        for line in range(max(map(len, cells))):
            found.append([encodable(printable(cell[line])) if line < len(cell) else "" for cell in cells])
    right = {place + bool(bars) for place in table.right}
    widths = [max(cell_len(row[place]) for row in found) for place in range(len(found[0]))]
    padded = [[_padded(cell, widths[p], left=p not in right) for p, cell in enumerate(row)] for row in found]
    return ["  " + "  ".join(row).rstrip() for row in padded]


def _padded(cell: str, width: int, *, left: bool) -> str:
    pad = " " * (width - cell_len(cell))
    return cell + pad if left else pad + cell


def _html(table: Table) -> str:
    heads = [_cell("th", escape(head), right=place in table.right) for place, head in enumerate(table.heads)]
    rows = ["".join(heads)]
    for number, row in enumerate(table.rows):
        bar = table.bars[number] if table.bars is not None else None
        cells = []
        for place, cell in enumerate(row):
            shown = escape(printable(cell)) if place != table.selectors else _selectors(cell)
            cells.append(_cell("td", shown, right=place in table.right, bar=None if place else bar))
        rows.append("".join(cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table style="border-collapse:collapse;margin:.3em 0;font:inherit;color:inherit">{body}</table>'


def _selectors(cell: str) -> str:
    """Each selector as an element that one click selects as a whole, to be copied."""
    style = "user-select:all;font:inherit;color:inherit;background:none;padding:0"
    return "<br>".join(f'<code style="{style}">{escape(printable(line))}</code>' for line in cell.split("\n"))


def _cell(tag: str, shown: str, *, right: bool, bar: float | None = None) -> str:
    style = f"text-align:{'right' if right else 'left'};vertical-align:top;padding:0 .9em 0 0;white-space:pre"
    if bar is not None:
        share = f"{100 * min(max(bar, 0.0), 1.0):.0f}%"
        style += f";background:linear-gradient(to right,{_FILL} {share},transparent {share})"
    return f'<{tag} style="{style}">{shown}</{tag}>'
