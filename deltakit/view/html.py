"""A tree as HTML for notebooks and papers: nested lists that open and close, without any script.

Colours stand in `style` attributes: notebooks that are not trusted drop `<style>` and scripts, and keep these.
"""

from collections.abc import Iterator
from html import escape

from deltakit.view.text import Row, rows, totals
from deltakit.view.tree import Node

# Each has a contrast of at least 4.5 on its ground; `light-dark` follows the page.
_COLOURS = {
    "type": "light-dark(#116329,#7ee787)",
    "trainable": "light-dark(#0550ae,#79c0ff)",
    "frozen": "light-dark(#57606a,#9198a1)",
    "delta": "light-dark(#8250df,#d2a8ff)",
    "folded": "light-dark(#a40e26,#ff7b72)",
}
_LIST = 'style="list-style:none!important;margin:0;padding-left:1.2em"'


def html(node: Node, *, open_to: int = 2) -> str:
    """A `<div>` with the whole tree, open down to a depth, folded rows closed."""
    lines = iter(rows(node, ties=True))
    tree = _item(node, lines, 0, open_to)
    style = "font-family:ui-monospace,monospace;font-size:13px;line-height:1.5;color-scheme:light dark"
    return f'<div style="{style}"><ul {_LIST}>{tree}</ul><div>{escape(totals(node))}</div></div>'


def _item(node: Node, lines: Iterator[Row], depth: int, open_to: int) -> str:
    own = next(lines)
    deltas = "".join(f"<li>{_row(next(lines))}</li>" for _ in node.deltas)
    children = "".join(_item(child, lines, depth + 1, open_to) for child in node.children)
    more = f"<li>{_row(next(lines))}</li>" if node.hidden else ""
    inner = deltas + children + more
    if not inner:
        return f"<li>{_row(own)}</li>"
    is_open = " open" if depth < open_to and node.members == 1 else ""
    return f"<li><details{is_open}><summary>{_row(own)}</summary><ul {_LIST}>{inner}</ul></details></li>"


def _row(row: Row) -> str:
    pieces = [
        f'<span style="color:{_COLOURS[part]}">{escape(piece)}</span>' if part in _COLOURS else escape(piece)
        for piece, part in row.pieces
    ]
    cells = " ".join(cell for cell in row.cells if cell.strip())
    colour = _COLOURS.get(row.state, "inherit")
    return "".join(pieces) + (
        f' <span style="color:{colour};white-space:pre">  {escape(cells)}</span>' if cells else ""
    )
