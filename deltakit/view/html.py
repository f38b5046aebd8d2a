"""Prints a tree as HTML for notebooks and pages: nested parts that open and close without a script.

What a reader needs is in `style` attributes that JupyterLab's sanitizer keeps (its `sanitizer.ts` lists them). Colours, and
what needs a script, are in `tree_style`.
"""

from collections.abc import Iterator, Sequence
from html import escape

from rich.cells import cell_len

from deltakit.view.legend import legend, totals
from deltakit.view.node import Node
from deltakit.view.tree_rows import GLYPHS, Row, rows
from deltakit.view.tree_style import SCRIPT, STYLE

_MOST_ROWS = 40
"""Without deltas, the tree opens as far as this many rows."""

_FONT = "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;line-height:1.5"
# Marks outside, so that names with and without one stand below each other. A line in mid grey shows on white and on black.
_INSIDE = "margin-left:0.35em;padding-left:1.35em;border-left:1px solid #888888"
_TREE = "white-space:nowrap;padding-left:1.2em;box-sizing:border-box;max-width:100%"
_SUMMARY = "list-style-position:outside"
_TINT = ";background-color:rgba(130,80,223,0.16)"
_BOLD = ";font-weight:bold"
_LABEL = "overflow:hidden;text-overflow:ellipsis"
_CELLS = "margin-left:auto;white-space:pre"


def html(node: Node, *, columns: Sequence[str]) -> str:
    """Returns a `<div>` with the whole tree, open down to the deltas."""
    found = rows(node, structure_only=not columns)
    sizes = {column: max(cell_len(row.cells.get(column, "")) for row in found) for column in columns}
    sizes = {column: size for column, size in sizes.items() if size}
    remaining = iter(found)
    tree = _Tree(sizes, 1 if node.sizes.delta else _depth(node)).item(node, remaining, 0)
    # A cell of monospaced fonts is at most 0.61 em wide, and an indentation is 1.7 em. On narrower pages labels are cut.
    ends = [0.61 * cell_len(row.label) + 1.8 * len(row.ends) for row in found]
    width = max(ends) + 0.61 * (sum(sizes.values()) + len(sizes) + 2) + 2
    selectors = "".join(f"<div><code>{escape(row.selector)}</code></div>" for row in found if row.selector)
    lines = [_parts(legend(node, found, sizes)), _parts(totals(node))] if columns else []
    return (
        f'<div class="deltakit-tree" style="{_FONT}"><style>{STYLE}</style>'
        f'<div class="dk-tree" style="{_TREE};width:{width:.0f}em">{tree}</div>'
        + "".join(f"<div>{line}</div>" for line in lines if line)
        + f'<details class="dk-selectors"><summary>selectors of these rows</summary>{selectors}</details>'
        f"<script>{SCRIPT}</script></div>"
    )


def _depth(node: Node) -> int:
    """How many levels show at most `_MOST_ROWS` rows."""
    level, shown, depth = [node], 1, 0
    while level:
        level = [child for parent in level for child in parent.children]
        shown += len(level)
        if shown > _MOST_ROWS:
            return max(depth, 1)
        depth += 1
    return depth


def _parts(parts: Sequence[str]) -> str:
    """Parts of a line, which is wrapped between them only."""
    return " · ".join(f'<span style="white-space:nowrap">{escape(part)}</span>' for part in parts)


class _Tree:
    def __init__(self, sizes: dict[str, int], depth: int) -> None:
        self.sizes, self.depth = sizes, depth

    def item(self, node: Node, remaining: Iterator[Row], depth: int) -> str:
        own = next(remaining)
        lines = [f'<div class="dk-item">{self.row(next(remaining))}</div>' for _ in node.deltas]
        lines += [self.item(child, remaining, depth + 1) for child in node.children]
        lines += [f'<div class="dk-item">{self.row(next(remaining))}</div>'] if node.hidden else []
        if not lines:
            return f'<div class="dk-item">{self.row(own)}</div>'
        is_open = " open" if depth < self.depth or node.sizes.delta else ""
        inside = f'<div class="dk-in" style="{_INSIDE}">{"".join(lines)}</div>'
        return f'<div class="dk-item"><details{is_open}>{self.row(own, "summary")}{inside}</details></div>'

    def row(self, row: Row, tag: str = "div") -> str:
        label = ""
        for piece in row.pieces:
            copies = piece.part in ("name", "folded") and row.selector and "data-selector" not in label
            attribute = f' data-selector="{escape(row.selector)}"' if copies else ""
            label += f'<span class="dk-{piece.part}"{attribute}>{escape(piece.text)}</span>'
        cells = "".join(
            f" {' ' * (size - cell_len(row.cells.get(column, '')))}{row.cells.get(column, '')}"
            for column, size in self.sizes.items()
        )
        style = (_SUMMARY if tag == "summary" else "") + (_TINT if row.state == "delta" else "")
        style += _BOLD if row.state == "delta" and row.cells["state"].startswith(GLYPHS["delta"]) else ""
        styled = f' style="{style.removeprefix(";")}"' if style else ""
        state = "delta" if row.state == "delta" else "trainable" if row.state == "trainable" else "cells"
        shown = f'<span class="dk-{state}" style="{_CELLS}"> {escape(cells)}</span>' if cells.strip() else ""
        inner = f'<div style="display:flex"><span class="dk-label" style="{_LABEL}">{label}</span>{shown}</div>'
        return f'<{tag} class="dk-row"{styled}>{inner}</{tag}>'
