"""The table of methods: one line for each where there is room, else a block of lines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from deltakit.core import Design


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """What is known of one method, in words.

    `merged`, `summed`, `mixed` and `identity` are "yes" or "no", and `merged` is "partly" if some targets have an update of a
    weight and others have not. They are "" where the method could not be tried.
    """

    name: str
    design: Design
    positions: Sequence[str]
    merged: str
    summed: str
    mixed: str
    identity: str
    source: str

    def cells(self) -> tuple[str, ...]:
        """Returns the cells of its line, in the order of `HEADS`."""
        view = (self.design.form, self.design.changes, self.design.insertion, self.design.composition)
        abilities = (self.merged, self.summed, self.mixed, self.identity)
        return tuple(cell or "?" for cell in (self.name, *view, " ".join(self.positions), *abilities, self.source))


HEADS = (
    *("method", *(field.name for field in fields(Design)), "default positions"),
    *("merged", "summed", "mixed batches", "no-op untrained", "source"),
)


class MethodTable:
    """Methods with their designs and abilities, to be printed with `rich`.

    A file or a pipe gets one line for each method, whatever its length, and so does a terminal that is wide enough. Any other
    terminal gets a block of short lines for each.
    """

    def __init__(self, rows: Iterable[MethodRow]) -> None:
        self.rows = list(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [HEADS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if not console.is_terminal or sum(widths) + 2 * (len(widths) - 1) <= options.max_width:
            for line in lines:
                text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
                yield Text(text.rstrip(), no_wrap=True, overflow="ignore")
            return
        for row in self.rows:
            yield Text(row.name, style="bold")
            block = Table.grid(padding=(0, 2))
            block.add_column(min_width=len(max(HEADS, key=len)) + 2, no_wrap=True)
            for head, cell in zip(HEADS[1:], row.cells()[1:], strict=True):
                block.add_row(f"  {head}", cell)
            yield block
