"""Web pages that stand alone: no other file, and the colours of the reader's theme."""

from collections.abc import Iterable, Sequence
from html import escape

from deltakit.errors import printable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; overflow-x: auto; }
pre { font: 13px/1.5 ui-monospace, monospace; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid light-dark(#d0d7de, #3d444d); text-align: right; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
.bar { width: 20rem; padding: 0; }
.bar > div { background: light-dark(#0550ae, #79c0ff); height: 1rem; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """Returns a whole HTML document, light or dark as the reader's system.

    Args:
        title: its title, as text.
        body: its body, as HTML.
        style: rules for it in CSS.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}</title>{f'<style>{style}</style>' if style else ''}</head>\n<body>{body}</body></html>\n"
    )


def web_page(title: str, parts: Iterable[str]) -> str:
    """Returns a whole HTML page with a heading.

    Args:
        title: its title, as text.
        parts: what stands below the title, as HTML.
    """
    body = "\n".join(parts)
    return page(title, f"<h1>{_text(title)}</h1>\n{body}\n", _STYLE)


def preformatted(text: str) -> str:
    """Returns text of several lines as HTML that keeps its spaces and line breaks."""
    return f"<pre>{chr(10).join(map(_text, text.splitlines()))}</pre>"


def paragraph(text: str, *, strong: bool = False) -> str:
    """Returns text as an HTML paragraph."""
    return f"<p><strong>{_text(text)}</strong></p>" if strong else f"<p>{_text(text)}</p>"


def heading(text: str) -> str:
    """Returns text as an HTML heading below the title."""
    return f"<h2>{_text(text)}</h2>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Sequence[str] = ()) -> str:
    """Returns an HTML table. Cells are text, or bars made by `bar`.

    Args:
        texts: the heads of columns that are aligned at the left; the others hold numbers.
    """
    kinds = [" class='text'" if head in texts else "" for head in heads]
    top = "".join(f"<th{kind}>{_text(head)}</th>" for head, kind in zip(heads, kinds, strict=True))
    lines = [
        "".join(
            f"<td class='bar'>{cell}</td>" if isinstance(cell, _Bar) else f"<td{kind}>{_text(cell)}</td>"
            for cell, kind in zip(row, kinds, strict=True)
        )
        for row in rows
    ]
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


class _Bar(str):
    """The HTML of a bar."""


def bar(share: float) -> str:
    """Returns a bar for a cell of a table.

    Args:
        share: its length, in [0, 1].
    """
    return _Bar(f"<div style='width:{100 * share:.1f}%'></div>")


def _text(text: str) -> str:
    return escape(printable(text))
