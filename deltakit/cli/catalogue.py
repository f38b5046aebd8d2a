"""The command that prints the methods."""

from typing import Annotated

import typer

from deltakit.cli.arguments import Html, Json
from deltakit.cli.method_lines import method_lines
from deltakit.cli.method_table import MethodTable, method_table
from deltakit.cli.printing import present


def _names(incomplete: str) -> list[str]:
    return [name for name in method_lines() if name.startswith(incomplete)]


def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Only these, such as lora; by default all.", autocompletion=_names),
    ] = None,
    *,
    json: Json = False,
    html: Html = None,
) -> None:
    """Print the methods: what each changes, where, what it can do, and its paper.

    With names, the options of these follow, which --set of other commands sets.
    """
    rows = method_table(names or ())
    present(MethodTable(rows, options=bool(names)), rows, title="Methods", json=json, html=html, wrap=True)
