"""`show(model)`: the structure of a backbone with its deltas, in a terminal, a notebook or a file."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text
from torch import nn

from deltakit.core import Inputs, Selector, checked
from deltakit.errors import OptionError
from deltakit.view.calls import OF_A_FORWARD
from deltakit.view.collector import collector_paused
from deltakit.view.data import data
from deltakit.view.filtering import filtered
from deltakit.view.folding import folded
from deltakit.view.forward import with_calls
from deltakit.view.html import html
from deltakit.view.node import Node, cut
from deltakit.view.report_page import page
from deltakit.view.svg import svg
from deltakit.view.text import ALIGNED, Line, text
from deltakit.view.tree import build
from deltakit.view.tree_rows import COLUMNS, ON_REQUEST


@checked
@dataclass(frozen=True)
class View:
    """A tree that displays itself: as text with `print`, in colour with `rich`, as HTML in a notebook.

    Raises:
        OptionError: if a column is unknown, or `width` is below 1.
    """

    node: Node
    columns: tuple[str, ...]
    width: int | None = None
    ascii: bool | None = None

    def __post_init__(self) -> None:
        known = (*COLUMNS, *ON_REQUEST)
        unknown = [column for column in self.columns if column not in known]
        if unknown:
            raise OptionError(
                f"columns={list(self.columns)!r}: unknown column {unknown[0]!r}; choose from {', '.join(known)}"
            )
        if self.width is not None and self.width < 1:
            raise OptionError(f"width={self.width}: expected at least 1; omit it for that of the terminal")

    def _lines(self, width: int | None, encoding: str = "utf-8") -> list[Line]:
        """Returns the lines.

        Args:
            width: the most cells of a line; None for as many as each needs.
            encoding: that of the output. If it is none of Unicode, the lines are ASCII unless `ascii` says otherwise.
        """
        plain = "utf" not in encoding.lower() if self.ascii is None else self.ascii
        return text(self.node, columns=self.columns, width=width, ascii=plain)

    def __str__(self) -> str:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # Until the lines are gone: the collector would look through all of their parts.
        with collector_paused():
            return "\n".join([line.plain for line in self._lines(self.width or self._usual_width(), encoding)])

    __repr__ = __str__

    def _usual_width(self) -> int | None:
        """That of the terminal, if there is one. OpenDelta's tree is never cut."""
        if not self.columns:
            return None
        # A program without a console has no stdout at all.
        in_terminal = sys.stdout is not None and sys.stdout.isatty()
        return shutil.get_terminal_size((ALIGNED, 24)).columns if in_terminal else ALIGNED

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self._lines(self.width or options.max_width, options.encoding):
            styled = line.styled()
            styled.no_wrap = True
            yield styled

    def html(self) -> str:
        """Returns the tree as one HTML element, open down to the deltas.

        Its colours are those of the page around it. A script expands all rows, searches, and copies a row's selector on a
        click; without it, as in notebooks that are not trusted, rows still open and close.
        """
        return html(self.node, columns=self.columns)

    def svg(self) -> str:
        """Returns the text of the tree as an SVG picture, in light or dark colours as the reader's system has them."""
        return svg(self._lines(self.width or ALIGNED), "structure of the model")

    def to_dict(self) -> dict[str, Any]:
        """Returns the tree as data that `json.dumps` takes: totals, and a "root" row with its "children".

        A row has "names" and "types" of its modules, a "selector" for them (null if there is none), the number of "modules",
        their "parameters" together and "parameters_in_each", a "state", and "weights" with shapes and dtypes. Rows with
        deltas have "deltas". Names are those of the model, also where they have control characters.
        """
        return data(self.node)

    def json(self) -> str:
        """Returns what `to_dict` returns as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the tree to a file, and returns its path. The ending says what is written.

        `.html` is a page that needs no other file, `.svg` a picture, `.txt` the text with its lines in full unless the view
        has a width, and `.json` data.

        Raises:
            OptionError: if the ending is another one, or the file cannot be written.
        """
        path = Path(path)
        writers = {
            ".html": lambda: page("structure of the model", self.html()),
            ".svg": self.svg,
            ".txt": lambda: "\n".join(line.plain for line in self._lines(self.width)) + "\n",
            ".json": lambda: self.json() + "\n",
        }
        write = writers.get(path.suffix.lower())
        if write is None:
            raise OptionError(
                f"View.save({str(path)!r}): expected a name that ends in {', '.join(writers)}, found {path.suffix!r}; "
                "write 'tree.html', for example"
            )
        try:
            path.write_text(write(), encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"View.save({str(path)!r}): could not be written: {error}; choose a file in a folder that exists"
            ) from error
        return path

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self.html()}


@checked
def show(
    backbone: nn.Module,
    *,
    depth: int | None = None,
    filter: Selector | None = None,
    fold: bool = True,
    columns: Sequence[str] = COLUMNS,
    all_modules: bool = False,
    buffers: bool = False,
    inputs: Inputs | None = None,
    width: int | None = None,
    ascii: bool | None = None,
) -> View:
    """Returns the structure of a backbone with its deltas, as a tree that folds equal parts.

    Counts are sums over all modules that a row stands for.

    >>> show(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3)))
    root                                        ● 18
    └── 0-1 (Linear) weight:[3, 2] bias:[3]  ×2 ● 18
    ×N: N modules, counted together · ● trainable
    18 parameters · trainable 18 (100 %) · frozen 0

    Args:
        depth: the number of levels to show below the root; by default all.
        filter: selectors. Only what they match is shown, with the modules around it; `["@attn", "@attn/**"]` also shows what
            is in a match. Counts stay those of the whole model.
        fold: whether equal siblings share one line.
        columns: "members", "state" and "count" by default. Further ones are "each" (the count in one of the modules), "dtype"
            (as it is stored), "bytes" and "device". An empty list shows the structure only, as OpenDelta does.
        all_modules: whether modules without parameters get a line.
        buffers: whether buffers are listed, too.
        inputs: what the model is called with, for one forward in its current mode without gradients: a tensor, a list of
            arguments, or a dictionary of named ones. It adds the columns "output" (the shape of what each module returned
            last), "calls" (of each module) and "flops" (of all together, with those of deltas; two for a multiplication with
            an addition). Buffers and random numbers stay as they are; a model on the meta device computes nothing.
        width: the line width in cells. Where a line is too long, shapes give way first, and columns never. By default that of
            the terminal, and 120 elsewhere.
        ascii: whether to use ASCII only; by default if the output's encoding is not a Unicode one.

    Raises:
        TargetError: if the backbone is not a `torch.nn.Module`.
        OptionError: if a column is unknown or needs inputs, `depth` or `width` is below 1, or the forward fails with these
            inputs.
        SelectorError: if a selector of the filter is malformed or matches nothing, or no match has parameters.
        RoleError: if a role of the filter does not exist, or this backbone has no sure answer for it.
    """
    if depth is not None and depth < 1:
        raise OptionError(f"show(depth={depth}): expected at least 1; omit it for no limit")
    measured = [column for column in columns if column in OF_A_FORWARD]
    if measured and inputs is None:
        raise OptionError(
            f"show(columns=...): the column {measured[0]!r} needs a forward; pass inputs= or omit the column"
        )
    if columns and inputs is not None and not measured:
        columns = (*columns, *OF_A_FORWARD)
    # Paused once for all: each end of a pause looks through all that was made. A forward may need the collector.
    with collector_paused() if inputs is None else nullcontext():
        node = build(
            backbone, all_modules=all_modules, buffers=buffers, devices="device" in columns, memory="bytes" in columns
        )
        node = node if inputs is None else with_calls(node, backbone, inputs)
        node = node if filter is None else filtered(node, backbone, filter)
        return View(cut(folded(node) if fold else node, depth), tuple(columns), width, ascii)
