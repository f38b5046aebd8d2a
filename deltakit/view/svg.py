"""Draws a tree as an SVG picture, for READMEs and papers. It has its own background, light or dark as the
reader's system."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from rich.cells import cell_len

from deltakit.view.text import THEME, Line

_WIDTH, _HEIGHT, _MARGIN = 7.8, 18, 14
"""The sizes of a cell and of the margin in pixels, for letters of 13 pixels."""

# Each colour has a contrast of at least 4.5 on its background (WCAG AA).
_LIGHT = {
    "back": "#ffffff",
    "": "#1f2328",
    "type": "#116329",
    "trainable": "#0550ae",
    "frozen": "#59636e",
    "delta": "#8250df",
}
_DARK = {
    "back": "#0d1117",
    "": "#e6edf3",
    "type": "#7ee787",
    "trainable": "#79c0ff",
    "frozen": "#9198a1",
    "delta": "#d2a8ff",
}
_CLASSES = {style: part for part, style in THEME.items()} | {THEME["frozen"]: "frozen", THEME["shape"]: "delta"}
_BOLD = "font-weight:bold"


def svg(lines: Sequence[Line], title: str) -> str:
    """Returns the picture of the lines of a tree.

    Each part of a line has its place and length in cells, so columns stand below each other in any font.
    """
    width = 2 * _MARGIN + _WIDTH * max(cell_len(line.plain) for line in lines)
    height = 2 * _MARGIN + _HEIGHT * len(lines)
    drawn = "\n".join(
        piece for n, line in enumerate(lines) for piece in _pieces(line, _MARGIN + _HEIGHT * n + 0.75 * _HEIGHT)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.1f} {height}" width="{width:.1f}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>\n{_rules(_LIGHT)}text{{font:13px ui-monospace,Menlo,Consolas,'
        f"monospace;white-space:pre}}\n.delta,.folded{{{_BOLD}}}\n"
        f"@media (prefers-color-scheme:dark){{\n{_rules(_DARK)}}}\n</style>\n"
        f'<rect class="back" width="100%" height="100%" rx="6"/>\n{drawn}\n</svg>\n'
    )


def _rules(colours: dict[str, str]) -> str:
    return "".join(f"{f'.{name}' if name else 'text'}{{fill:{colour}}}\n" for name, colour in colours.items())


def _pieces(line: Line, y: float) -> Iterator[str]:
    """One `<text>` for each part of a line that has a style of its own."""
    cells = 0
    for style, parts in groupby(line.parts, key=lambda part: part[1]):
        text = "".join(part for part, _ in parts)
        letters = text.strip()
        if letters:
            kind = _CLASSES.get(style, "")
            x = _MARGIN + _WIDTH * (cells + len(text) - len(text.lstrip()))
            yield (
                f'<text x="{x:.1f}" y="{y:.1f}" textLength="{_WIDTH * cell_len(letters):.1f}" '
                f'lengthAdjust="spacingAndGlyphs"{f" class={kind!r}" if kind else ""} xml:space="preserve">'
                f"{escape(letters)}</text>"
            )
        cells += cell_len(text)
