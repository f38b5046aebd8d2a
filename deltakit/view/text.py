"""Lays a tree out as text: lines with guides, and columns at the right.

Lines are never wrapped. Where one is too long for the width, buffers and shapes give way first, then configurations and types,
and names last. The columns stay, so that every line says its state, its count and its number of modules.
"""

from collections.abc import Mapping, Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from deltakit.view.legend import legend, totals
from deltakit.view.node import Node
from deltakit.view.tree_rows import Row, rows

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
        "…": "~",
        "·": "|",
        "→": ">",
    }
)
_LEAST = 12
"""The fewest cells that a label gets before columns are left out."""


def text(node: Node, *, columns: Sequence[str], width: int | None, ascii: bool) -> list[Text]:
    """Returns the lines of a tree as styled text, at most `width` cells wide.

    Without columns, only the structure is printed, as OpenDelta does.
    """
    found = rows(node, structure_only=not columns)
    sizes = {column: max(cell_len(row.cells.get(column, "")) for row in found) for column in columns}
    sizes = {column: size for column, size in sizes.items() if size}
    while width is not None and sizes and _right(sizes) + _LEAST > width:
        sizes.popitem()
    most = None if width is None else max(width - _right(sizes), 1)
    step = 4 if most is None or max(4 * len(row.ends) for row in found) <= most // 2 else 2
    labels = [_label(row, step, most) for row in found]
    room = min(max(map(_cells, labels)), max(ALIGNED - _right(sizes), 1))
    shown = [_with_cells(label, row, room, sizes) for label, row in zip(labels, found, strict=True)]
    if columns:
        shown += [Text(line, style="dim") for line in _wrapped(legend(node, found, sizes), width)]
        shown += [Text(line) for line in _wrapped(totals(node), width)]
    if ascii:
        for line in shown:
            line.plain = line.plain.translate(_ASCII)
    return shown


def _right(sizes: Mapping[str, int]) -> int:
    """The width of the columns, with a space before each and another one before the first."""
    return sum(size + 1 for size in sizes.values()) + 1 if sizes else 0


def _guide(ends: Sequence[bool], step: int) -> str:
    if not ends:
        return ""
    above = "".join((" " if end else "│").ljust(step) for end in ends[:-1])
    return above + (("└" if ends[-1] else "├") + "─" * (step - 2)).ljust(step)


def _label(row: Row, step: int, room: int | None) -> Text:
    """The guide and the label of a row, at most `room` cells wide."""
    label = Text(_guide(row.ends, step), style="")
    pieces = list(row.pieces)
    if room is not None:
        free = room - cell_len(label.plain)
        while sum(cell_len(p.text) for p in pieces) + 2 * (len(pieces) < len(row.pieces)) > free:
            first = max((piece.gives_way for piece in pieces), default=0)
            if not first:
                break
            del pieces[max(place for place, piece in enumerate(pieces) if piece.gives_way == first)]
    for piece in pieces:
        label.append(piece.text, style=THEME.get(piece.part, ""))
    if len(pieces) < len(row.pieces):
        label.append(" …", style="dim")
    if room is not None and _cells(label) > room:
        label.truncate(room, overflow="ellipsis")
    return label


def _with_cells(label: Text, row: Row, room: int, sizes: Mapping[str, int]) -> Text:
    if sizes:
        label.append(" " * (max(room - _cells(label), 0) + 1))
    for column, size in sizes.items():
        cell = row.cells.get(column, "")
        style = THEME["folded"] if column == "members" else THEME.get(row.state, "")
        label.append(f" {' ' * (size - cell_len(cell))}{cell}", style=style)
    label.rstrip()
    return label


def _cells(label: Text) -> int:
    return cell_len(label.plain)


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
