"""A tree as text: rows with guides, and columns at the right. It never wraps a row.

×N members of the row    ● trainable  ○ frozen  ◐ both  Δ delta    parameters, in one instance of the row's parent
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from deltakit.view.report import share
from deltakit.view.tree import DeltaLine, Node

COLUMNS = ("members", "state", "count")

# Names of the sixteen terminal colours: the reader's own theme gives them contrast.
THEME = {"type": "green", "trainable": "blue", "frozen": "dim", "delta": "magenta", "folded": "red", "mixed": ""}

_GLYPHS = {"trainable": "●", "frozen": "○", "mixed": "◐", "delta": "Δ", "none": " "}
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


@dataclass(frozen=True)
class Row:
    """One line: its guide, its label as pieces of text with the part of the theme they belong to, and its cells."""

    guide: str
    pieces: tuple[tuple[str, str], ...]
    cells: tuple[str, str, str]
    state: str

    @property
    def label(self) -> str:
        return "".join(text for text, _ in self.pieces)


def rows(node: Node, *, ties: bool) -> list[Row]:
    """The rows of a tree, the root first. `ties`: whether rows say what their weights are tied to."""
    return list(_rows(node, "", "", ties))


def _rows(node: Node, guide: str, below: str, ties: bool) -> Iterator[Row]:
    yield _row(node, guide, ties)
    last = len(node.deltas) + len(node.children) + bool(node.hidden) - 1
    place = 0
    for line in node.deltas:
        yield _delta_row(line, below + ("└── " if place == last else "├── "))
        place += 1
    for child in node.children:
        end = place == last
        yield from _rows(child, below + ("└── " if end else "├── "), below + ("    " if end else "│   "), ties)
        place += 1
    if node.hidden:
        yield Row(f"{below}└── ", ((f"… {node.hidden} more rows", "frozen"),), ("", "", ""), "none")


def _row(node: Node, guide: str, ties: bool) -> Row:
    state = state_of(node)
    pieces: list[tuple[str, str]]
    if not guide:
        pieces = [(node.names[0], "")]
    else:
        names, bracket, types = node.title.partition("(")
        whole = (node.title, "type") if len(set(node.types)) > 1 else None
        pieces = [whole] if whole else [(names, "folded" if node.members > 1 else ""), (bracket + types, "type")]
    pieces += [(f" {weight}", "trainable" if weight.trainable else "frozen") for weight in node.weights]
    if ties and node.alias:
        pieces.append((f" → {node.alias}", ""))
    tied = [weight.tied for weight in node.weights if weight.tied]
    if ties and tied and len(set(node.types)) == 1:
        pieces.append((f"  = {', '.join(tied)}", ""))
    both = len(set(node.types)) > 1
    total = (node.count + node.delta) * (1 if both else node.members)
    count = "tied" if tied and not total else short(total)
    return Row(guide, tuple(pieces), (f"×{node.members}" if node.members > 1 else "", _GLYPHS[state], count), state)


def _delta_row(line: DeltaLine, guide: str) -> Row:
    weights = " ".join(map(str, line.weights))
    frozen = "" if all(weight.trainable for weight in line.weights) else "  frozen"
    text = f"+{line.label} {line.summary}".rstrip() + (f"  {weights}" if weights else "")
    return Row(
        guide,
        ((text + ("" if line.active else "  off") + frozen, "delta"),),
        ("", _GLYPHS["delta"], short(line.count)),
        "delta",
    )


def state_of(node: Node) -> str:
    """Whether what a row stands for is trainable, frozen, or both; none if it holds no parameters of its own."""
    total, trained = node.count + node.delta, node.trained + node.delta_trained
    if not total:
        return "none"
    return "trainable" if trained == total else "mixed" if trained else "frozen"


def short(number: int) -> str:
    """A count in at most six characters.

    >>> short(512), short(16_384), short(4_200_000), short(70_553_706_496)
    ('512', '16.4K', '4.2M', '70.6B')
    """
    for power, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * power:
            return f"{number / power:.3g}{unit}" if number < 999.5 * power else f"{number / power:.0f}{unit}"
    return str(number) if number else ""


def totals(node: Node) -> str:
    """One line that adds everything up, each parameter counted once."""
    total, trained = node.count + node.delta, node.trained + node.delta_trained
    parts = [f"{total:,} parameters", f"trainable {trained:,} ({share(trained, total)})"]
    if node.delta:
        parts.append(f"in deltas {node.delta:,}")
    return " · ".join([*parts, f"frozen {total - trained:,}"])


def text(node: Node, *, columns: Sequence[str], width: int | None, ascii: bool) -> list[Text]:
    """The lines of a tree as styled text, at most `width` cells wide; without columns, the plain structure alone."""
    lines = rows(node, ties=bool(columns))
    kept = [COLUMNS.index(column) for column in columns]
    left = max(cell_len(row.guide + row.label) for row in lines)
    sizes = [max(cell_len(row.cells[index]) for row in lines) for index in kept]
    while width is not None and kept and left + sum(size + 1 for size in sizes) + 1 > width:
        kept.pop()
        sizes.pop()
    room = left if width is None else min(left, width)
    styled = [_line(row, room, list(zip(kept, sizes, strict=True))) for row in lines]
    if columns:
        styled.append(Text(totals(node) if width is None else _fit(totals(node), width).rstrip()))
    if ascii:
        for line in styled:
            line.plain = line.plain.translate(_ASCII)
    return styled


def _line(row: Row, room: int, columns: Sequence[tuple[int, int]]) -> Text:
    line = Text(row.guide, style="")
    for piece, part in row.pieces:
        line.append(piece, style=THEME.get(part, ""))
    if cell_len(line.plain) > room:
        line.truncate(room, overflow="ellipsis")
    if columns:
        line.append(" " * (room - cell_len(line.plain) + 1))
        for index, size in columns:
            pad = " " * (size - cell_len(row.cells[index]))
            line.append(f" {pad}{row.cells[index]}", style=THEME.get("folded" if index == 0 else row.state, ""))
    line.rstrip()
    return line


def _fit(line: str, width: int) -> str:
    return line if cell_len(line) <= width else set_cell_size(line, max(0, width - 1)) + "…"
