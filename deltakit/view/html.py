"""Prints a tree as HTML for notebooks and papers: nested lists that open and close without a script.

Colours are in `style` attributes, because notebooks that are not trusted remove `<style>` elements and scripts.
"""

from collections.abc import Iterator
from html import escape

from deltakit.view.text import TreeLine, lines, totals
from deltakit.view.tree import Node

# Each colour has a contrast of at least 4.5 (WCAG AA) on its background; `light-dark` follows the page's theme.
_COLOURS = {
    "type": "light-dark(#116329,#7ee787)",
    "trainable": "light-dark(#0550ae,#79c0ff)",
    "frozen": "light-dark(#57606a,#9198a1)",
    "delta": "light-dark(#8250df,#d2a8ff)",
    "folded": "light-dark(#a40e26,#ff7b72)",
}
_LIST = 'style="list-style:none!important;margin:0;padding-left:1.2em"'


def html(node: Node, *, open_to: int = 2) -> str:
    """Returns a `<div>` with the whole tree. Levels below `open_to` and folded lines are closed."""
    remaining = iter(lines(node, ties=True))
    tree = _item(node, remaining, 0, open_to)
    style = "font-family:ui-monospace,monospace;font-size:13px;line-height:1.5;color-scheme:light dark"
    return f'<div style="{style}"><ul {_LIST}>{tree}</ul><div>{escape(totals(node))}</div></div>'


def _item(node: Node, remaining: Iterator[TreeLine], depth: int, open_to: int) -> str:
    own = next(remaining)
    deltas = "".join(f"<li>{_line(next(remaining))}</li>" for _ in node.deltas)
    children = "".join(_item(child, remaining, depth + 1, open_to) for child in node.children)
    more = f"<li>{_line(next(remaining))}</li>" if node.hidden else ""
    inner = deltas + children + more
    if not inner:
        return f"<li>{_line(own)}</li>"
    is_open = " open" if depth < open_to and node.members == 1 else ""
    return f"<li><details{is_open}><summary>{_line(own)}</summary><ul {_LIST}>{inner}</ul></details></li>"


def _line(line: TreeLine) -> str:
    pieces = [
        f'<span style="color:{_COLOURS[part]}">{escape(piece)}</span>' if part in _COLOURS else escape(piece)
        for piece, part in line.pieces
    ]
    cells = " ".join(cell for cell in line.cells if cell.strip())
    colour = _COLOURS.get(line.state, "inherit")
    return "".join(pieces) + (
        f' <span style="color:{colour};white-space:pre">  {escape(cells)}</span>' if cells else ""
    )
