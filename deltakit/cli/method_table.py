"""The table of methods: one line for each where there is room, else a block of lines.

`methods.json` has the rows of the methods in `deltakit/methods`. To find out what a method can do, `method_rows` of
`deltakit.delta` tries it, which takes seconds. `tests/test_public_names.py` writes the file, and compares it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from deltakit.cli.method_lines import known_method, method_lines

HEADS = (
    *("method", "form", "changes", "insertion", "composition", "default positions"),
    *("merged", "summed", "mixed batches", "no-op untrained", "source"),
)
_FILE = Path(__file__).with_name("methods.json")


def method_table(names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows of these methods, by default of all, in alphabetical order: the fields of `MethodRow` as plain data.

    Raises:
        BadParameter: if there is no method of a name.
    """
    known, wanted = method_lines(), set(map(known_method, names))
    rows = {row["name"]: row for row in json.loads(_FILE.read_text(encoding="utf-8"))}
    if rows.keys() != known.keys():
        # A method was added since the file was written.
        from deltakit.delta import method_rows

        rows = {row.name: asdict(row) for row in method_rows(list(known))}
    return [rows[name] for name in sorted(wanted or rows)]


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the cells of a method's line, in the order of `HEADS`."""
    design = row["design"]
    view = (design["form"], design["changes"], design["insertion"], design["composition"])
    abilities = (row["merged"], row["summed"], row["mixed"], row["identity"])
    return tuple(cell or "?" for cell in (row["name"], *view, " ".join(row["positions"]), *abilities, row["source"]))


def options_of(row: Mapping[str, Any]) -> str:
    """Returns the options of a method with their defaults, as Python writes them; VALUE stands for one that must be given."""
    required = [f"{name}=VALUE" for name in row["required"]]
    return " ".join([*required, *(f"{name}={value!r}" for name, value in row["options"].items())]) or "none"


class MethodTable:
    """Methods with their designs and abilities, to be printed with `rich`.

    A file or a pipe gets one line for each method, whatever its length, and so does a terminal that is wide enough. Any other
    terminal gets a block of short lines for each.

    Args:
        options: whether the options of each follow.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, options: bool = False) -> None:
        self.rows, self.options = list(rows), options

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [HEADS, *map(cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if not console.is_terminal or sum(widths) + 2 * (len(widths) - 1) <= options.max_width:
            for line in lines:
                text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
                yield Text(text.rstrip(), no_wrap=True, overflow="ignore")
            for row in self.rows if self.options else ():
                yield Text(f"{row['name']} options: {options_of(row)}")
            return
        for row in self.rows:
            yield Text(row["name"], style="bold")
            block = Table.grid(padding=(0, 2))
            block.add_column(min_width=len(max(HEADS, key=len)) + 2, no_wrap=True)
            # An address that is too long goes on in the next line.
            block.add_column(overflow="fold")
            for head, cell in zip(HEADS[1:], cells(row)[1:], strict=True):
                block.add_row(f"  {head}", cell)
            if self.options:
                block.add_row("  options", options_of(row))
            yield block
