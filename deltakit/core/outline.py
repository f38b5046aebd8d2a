"""Shows an indented text in a notebook: what is indented below a line opens and closes with it.

Everything stands in `style` attributes that notebooks keep if they are not trusted. Colours are those of the page.
"""

import re
from html import escape

_OUTER = (
    "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;line-height:1.5;white-space:pre;overflow-x:auto"
)
_INSIDE = "margin-left:0.35em;padding-left:1.35em;border-left:1px solid #888888"
_MOST_OPEN = 20
"""A line with more lines below it is closed at first."""
# Paths and selectors: a click selects the whole word. A double click would stop at the first dot or brace.
_SELECTOR = re.compile(r"(?<!\S)(?=\S*[.{@])\S*[^\s:;,]")


def notebook_bundle(text: str) -> dict[str, str]:
    """Returns what a notebook shows for an indented text: the text itself, and HTML in which its parts open and close."""
    lines = [(len(line) - len(line.lstrip(" ")), line.strip(" ")) for line in text.split("\n")]
    body = f'<div style="{_OUTER};padding-left:1.2em">{"".join(_items(lines))}</div>'
    return {"text/plain": text, "text/html": body}


def _items(lines: list[tuple[int, str]]) -> list[str]:
    """One element for each line of the lowest indentation, with the lines below it inside."""
    found = []
    while lines:
        indent, text = lines[0]
        end = next((n for n, (deep, _) in enumerate(lines[1:], 1) if deep <= indent), len(lines))
        own, inside, lines = _words(text), lines[1:end], lines[end:]
        if not inside:
            found.append(f"<div>{own}</div>")
            continue
        is_open = " open" if len(inside) <= _MOST_OPEN or not indent else ""
        found.append(
            f'<details{is_open}><summary style="list-style-position:outside;cursor:pointer">{own}</summary>'
            f'<div style="{_INSIDE}">{"".join(_items(inside))}</div></details>'
        )
    return found


def _words(text: str) -> str:
    parts, done = [], 0
    for found in _SELECTOR.finditer(text):
        word = f'<span style="user-select:all">{escape(found[0])}</span>'
        parts += [escape(text[done : found.start()]), word]
        done = found.end()
    return "".join([*parts, escape(text[done:])])
