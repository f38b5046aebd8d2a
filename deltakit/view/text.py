"""Prints a tree as text: lines with guides, and columns at the right. Lines are never wrapped.

×N equal modules on the line    ● trainable  ○ frozen  ◐ both  Δ delta    parameters in one of the parent's instances
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from deltakit.errors import printable
from deltakit.view.report import share
from deltakit.view.tree import DeltaLine, Node

COLUMNS = ("members", "state", "count")

# Only the sixteen named terminal colours: the user's own terminal theme gives them enough contrast.
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
class TreeLine:
    """One line of a printed tree.

    `guide` draws the branches, `pieces` are the texts of the label with their key in `THEME`, and `cells` are the columns.
    """

    guide: str
    pieces: tuple[tuple[str, str], ...]
    cells: tuple[str, str, str]
    state: str

    @property
    def label(self) -> str:
        return "".join(text for text, _ in self.pieces)


def lines(node: Node, *, ties: bool) -> list[TreeLine]:
    """Returns the lines of a tree, the root first. With `ties`, they name what their weights are tied to."""
    found = _lines(node, "", "", ties)
    return [replace(line, pieces=tuple((printable(text), part) for text, part in line.pieces)) for line in found]


def _lines(node: Node, guide: str, below: str, ties: bool) -> Iterator[TreeLine]:
    yield _node_line(node, guide, ties)
    last = len(node.deltas) + len(node.children) + bool(node.hidden) - 1
    place = 0
    for line in node.deltas:
        yield _delta_line(line, below + ("└── " if place == last else "├── "))
        place += 1
    for child in node.children:
        end = place == last
        yield from _lines(child, below + ("└── " if end else "├── "), below + ("    " if end else "│   "), ties)
        place += 1
    if node.hidden:
        yield TreeLine(f"{below}└── ", ((f"… {node.hidden} more lines", "frozen"),), ("", "", ""), "none")


def _node_line(node: Node, guide: str, ties: bool) -> TreeLine:
    state = state_of(node)
    pieces: list[tuple[str, str]]
    if not guide:
        pieces = [(node.names[0], "")]
    else:
        names, bracket, types = node.title.partition("(")
        mixed = (node.title, "type") if len(set(node.types)) > 1 else None
        pieces = [mixed] if mixed else [(names, "folded" if node.members > 1 else ""), (bracket + types, "type")]
    pieces += [(f" {weight}", "trainable" if weight.trainable else "frozen") for weight in node.weights]
    if ties and node.alias:
        pieces.append((f" → {node.alias}", ""))
    tied = [weight.tied for weight in node.weights if weight.tied]
    if ties and tied and len(set(node.types)) == 1:
        pieces.append((f"  = {', '.join(tied)}", ""))
    # Members of different types are tied to each other (T5's `shared` and `lm_head`): they hold their parameters once.
    tied_together = len(set(node.types)) > 1
    total = (node.count + node.delta) * (1 if tied_together else node.members)
    count = "tied" if tied and not total else short(total)
    return TreeLine(
        guide, tuple(pieces), (f"×{node.members}" if node.members > 1 else "", _GLYPHS[state], count), state
    )


def _delta_line(line: DeltaLine, guide: str) -> TreeLine:
    weights = " ".join(map(str, line.weights))
    frozen = "" if all(weight.trainable for weight in line.weights) else "  frozen"
    text = f"+{line.label} {line.summary}".rstrip() + (f"  {weights}" if weights else "")
    return TreeLine(
        guide,
        ((text + ("" if line.active else "  off") + frozen, "delta"),),
        ("", _GLYPHS["delta"], short(line.count)),
        "delta",
    )


def state_of(node: Node) -> str:
    """Returns whether a node is "trainable", "frozen" or "mixed"; "none" if it has no parameters."""
    total, trained = node.count + node.delta, node.trained + node.delta_trained
    if not total:
        return "none"
    return "trainable" if trained == total else "mixed" if trained else "frozen"


def short(number: int) -> str:
    """Returns a count as text of at most six characters.

    >>> short(512), short(16_384), short(4_200_000), short(70_553_706_496)
    ('512', '16.4K', '4.2M', '70.6B')
    """
    for power, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * power:
            return f"{number / power:.3g}{unit}" if number < 999.5 * power else f"{number / power:.0f}{unit}"
    return str(number) if number else ""


def totals(node: Node) -> str:
    """Returns the line of totals, in which each parameter is counted once."""
    total, trained = node.count + node.delta, node.trained + node.delta_trained
    parts = [f"{total:,} parameters", f"trainable {trained:,} ({share(trained, total)})"]
    if node.delta:
        parts.append(f"in deltas {node.delta:,}")
    return " · ".join([*parts, f"frozen {total - trained:,}"])


def text(node: Node, *, columns: Sequence[str], width: int | None, ascii: bool) -> list[Text]:
    """Returns the lines of a tree as styled text, at most `width` cells wide.

    Columns that do not fit are omitted from the right. Without columns, only the structure is printed.
    """
    found = lines(node, ties=bool(columns))
    kept = [COLUMNS.index(column) for column in columns]
    left = max(cell_len(line.guide + line.label) for line in found)
    sizes = [max(cell_len(line.cells[index]) for line in found) for index in kept]
    while width is not None and kept and left + sum(size + 1 for size in sizes) + 1 > width:
        kept.pop()
        sizes.pop()
    room = left if width is None else min(left, width)
    styled = [_styled(line, room, list(zip(kept, sizes, strict=True))) for line in found]
    if columns:
        styled.append(Text(totals(node) if width is None else _fit(totals(node), width).rstrip()))
    if ascii:
        for shown in styled:
            shown.plain = shown.plain.translate(_ASCII)
    return styled


def _styled(tree_line: TreeLine, room: int, columns: Sequence[tuple[int, int]]) -> Text:
    line = Text(tree_line.guide, style="")
    for piece, part in tree_line.pieces:
        line.append(piece, style=THEME.get(part, ""))
    if cell_len(line.plain) > room:
        line.truncate(room, overflow="ellipsis")
    if columns:
        line.append(" " * (room - cell_len(line.plain) + 1))
        for index, size in columns:
            pad = " " * (size - cell_len(tree_line.cells[index]))
            line.append(
                f" {pad}{tree_line.cells[index]}", style=THEME.get("folded" if index == 0 else tree_line.state, "")
            )
    line.rstrip()
    return line


def _fit(line: str, width: int) -> str:
    return line if cell_len(line) <= width else set_cell_size(line, max(0, width - 1)) + "…"
