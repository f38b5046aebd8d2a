"""The command that prints the methods."""

from typing import Annotated

import typer

from deltakit.cli.arguments import Html, Json
from deltakit.cli.printing import present
from deltakit.core import METHODS
from deltakit.delta import method_rows
from deltakit.view import MethodTable


def _names(incomplete: str) -> list[str]:
    return [name for name in sorted(METHODS) if name.startswith(incomplete)]


def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Only these, such as lora; by default all.", autocompletion=_names),
    ] = None,
    *,
    json: Json = False,
    html: Html = None,
) -> None:
    """Print the methods: what each changes, where, what it can do, and its paper."""
    rows = method_rows(names or ())
    present(MethodTable(rows), rows, title="Methods", json=json, html=html, wrap=True)
