"""Lays a tree out as text: lines with guides, and columns at the right.

Lines are never wrapped. Where one is too long for the width, buffers and shapes give way first, then configurations and types,
and names last. The columns stay, so that every line says its state, its count and its number of modules.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from deltakit.view.collector import collector_paused
from deltakit.view.legend import legend, totals
from deltakit.view.node import Node
from deltakit.view.tree_rows import ON_REQUEST, Row, rows

# Only the sixteen named terminal colours: the user's own terminal theme gives them enough contrast. Red is for errors.
THEME = {
    "type": "green",
    "trainable": "bold blue",
    "frozen": "dim",
    "buffers": "dim",
    "delta": "bold magenta",
    "shape": "magenta",
    "folded": "bold",
}
ALIGNED = 120
"""Columns stand at most here, whatever the width: one long line does not push the columns of all others away."""
_ASCII = str.maketrans(
    {
        "├": "|",
        "│": "|",
        "└": "`",
        "─": "-",
        "●": "*",
        "○": "-",
        "◐": "~",
        "Δ": "+",
        "×": "x",
        # Not "~", which stands for modules that are partly trainable.
        "…": ">",
        "·": "|",
        "→": ">",
    }
)
_LEAST = 12
"""The fewest cells that a label gets before columns are left out."""


class Line(NamedTuple):
    """A line in parts, each with the style of `rich` that it has.

    It becomes a text of `rich` only where colours are printed: that takes longer than all the rest.
    """

    parts: Sequence[tuple[str, str]]

    @property
    def plain(self) -> str:
        """The text without styles."""
        return "".join([part for part, _ in self.parts])

    def styled(self) -> Text:
        """Returns it as a text of `rich`."""
        return Text.assemble(*self.parts)


@collector_paused()
def text(node: Node, *, columns: Sequence[str], width: int | None, ascii: bool) -> list[Line]:
    """Returns the lines of a tree, at most `width` cells wide.

    Without columns, only the structure is printed, as OpenDelta does.
    """
    found = rows(node, structure_only=not columns)
    found = list(map(_in_ascii, found)) if ascii else found
    sizes = {column: max(_cells(row.cells.get(column, "")) for row in found) for column in columns}
    sizes = {column: size for column, size in sizes.items() if size}
    deepest = max(len(row.ends) for row in found)
    while width is not None and sizes and _right(sizes) + _least(next(reversed(sizes)), deepest) > width:
        sizes.popitem()
    most = None if width is None else max(width - _right(sizes), 1)
    step = 4 if most is None or 4 * deepest <= most // 2 else 2
    labels = [_label(row, step, most) for row in found]
    room = min(max(cells for _, cells in labels), max(ALIGNED - _right(sizes), 1))
    shown = [
        _line([*label, *_columns(row, max(room - cells, 0) + 1, sizes)])
        for (label, cells), row in zip(labels, found, strict=True)
    ]
    if columns:
        shown += [Line([(line, "dim")]) for line in _wrapped(legend(node, found, sizes), width)]
        shown += [Line([(line, "")]) for line in _wrapped(totals(node), width)]
    return [Line([(part.translate(_ASCII), style) for part, style in line.parts]) for line in shown] if ascii else shown


def _least(column: str, deepest: int) -> int:
    """The fewest cells that a label gets beside a column. Beside one on request the deepest label keeps its start."""
    return max(_LEAST, 2 * deepest + 8) if column in ON_REQUEST else _LEAST


def _in_ascii(row: Row) -> Row:
    """The row with names in ASCII; its glyphs are replaced when the line is written."""
    if all(piece.text.isascii() for piece in row.pieces):
        return row
    plain = [piece.text.translate(_ASCII).encode("ascii", "backslashreplace").decode() for piece in row.pieces]
    return row._replace(pieces=tuple(p._replace(text=text) for p, text in zip(row.pieces, plain, strict=True)))


def _right(sizes: Mapping[str, int]) -> int:
    """The width of the columns, with a space before each and another one before the first."""
    return sum(size + 1 for size in sizes.values()) + 1 if sizes else 0


def _guide(ends: Sequence[bool], step: int) -> str:
    if not ends:
        return ""
    above = "".join((" " if end else "│").ljust(step) for end in ends[:-1])
    return above + (("└" if ends[-1] else "├") + "─" * (step - 2)).ljust(step)


def _label(row: Row, step: int, room: int | None) -> tuple[list[tuple[str, str]], int]:
    """The guide and the label of a row, at most `room` cells wide, and how many cells they have."""
    guide = _guide(row.ends, step)
    pieces = [(len(piece.text) if piece.text.isascii() else cell_len(piece.text), piece) for piece in row.pieces]
    cells = len(guide) + sum([size for size, _ in pieces])
    while room is not None and cells > room:
        first = max((piece.gives_way for _, piece in pieces), default=0)
        if not first:
            break
        # What is left out first makes place for the mark that something is.
        cells += 2 * (len(pieces) == len(row.pieces))
        cells -= pieces.pop(max(place for place, (_, piece) in enumerate(pieces) if piece.gives_way == first))[0]
    parts = [(guide, ""), *[(piece.text, THEME.get(piece.part, "")) for _, piece in pieces]]
    if len(pieces) < len(row.pieces):
        parts.append((" …", "dim"))
    if room is not None and cells > room:
        return _cut(parts, room), room
    return parts, cells


def _cut(parts: Sequence[tuple[str, str]], room: int) -> list[tuple[str, str]]:
    left = set_cell_size("".join(part for part, _ in parts), room - 1) + "…"
    found = []
    for part, style in parts:
        found.append((left[: len(part)], style))
        left = left[len(part) :]
    return [(part, style) for part, style in found if part]


def _columns(row: Row, gap: int, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    found, state = [(" " * gap, "")] if sizes else [], THEME.get(row.state, "")
    for column, size in sizes.items():
        cell = row.cells.get(column, "")
        found.append((f" {' ' * (size - _cells(cell))}{cell}", THEME["folded"] if column == "members" else state))
    return found


def _line(parts: list[tuple[str, str]]) -> Line:
    """A line of these parts, without spaces at its end."""
    while parts and not parts[-1][0].rstrip():
        parts.pop()
    if parts and parts[-1][0][-1:].isspace():
        parts[-1] = parts[-1][0].rstrip(), parts[-1][1]
    return Line(parts)


def _cells(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _wrapped(parts: Sequence[str], width: int | None) -> list[str]:
    """Parts of a line with dots between them, on as many lines as they need."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]} · {part}" if lines else ""
        if lines and cell_len(longer) <= (width or ALIGNED):
            lines[-1] = longer
        else:
            lines.append(part)
    return lines if width is None else [_fit(line, width) for line in lines]


def _fit(line: str, width: int) -> str:
    return line if cell_len(line) <= width else set_cell_size(line, max(0, width - 1)).rstrip() + "…"
