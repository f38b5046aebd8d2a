"""`show(model)`: the structure of a backbone with its deltas, in a terminal, a notebook or a file."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.text import Text
from torch import nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.view.html import html
from deltakit.view.text import COLUMNS, text
from deltakit.view.tree import Node, build, cut


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
        unknown = [column for column in self.columns if column not in COLUMNS]
        if unknown:
            raise OptionError(
                f"columns={list(self.columns)!r}: unknown column {unknown[0]!r}; choose from {', '.join(COLUMNS)}"
            )
        if self.width is not None and self.width < 1:
            raise OptionError(f"width={self.width}: expected at least 1; omit it for no limit")

    def _lines(self, width: int | None, encoding: str) -> list[Text]:
        plain = "utf" not in encoding.lower() if self.ascii is None else self.ascii
        return text(self.node, columns=self.columns, width=width, ascii=plain)

    def __str__(self) -> str:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return "\n".join(line.plain for line in self._lines(self.width, encoding))

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self._lines(self.width or options.max_width, options.encoding):
            line.no_wrap = True
            yield line

    def html(self) -> str:
        """Returns the tree as one HTML element without scripts."""
        return html(self.node)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self.html()}


@checked
def show(
    backbone: nn.Module,
    *,
    depth: int | None = None,
    fold: bool = True,
    columns: Sequence[str] = COLUMNS,
    all_modules: bool = False,
    width: int | None = None,
    ascii: bool | None = None,
) -> View:
    """Returns the structure of a backbone with its deltas, as a tree that folds equal parts.

    >>> show(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3)))
    root                                       ● 18
    └── 0-1(Linear) weight:[3, 2] bias:[3]  ×2 ● 18
    18 parameters · trainable 18 (100 %) · frozen 0

    Args:
        depth: the number of levels to show below the root; by default all.
        fold: whether equal siblings share one line.
        columns: some of "members", "state" and "count"; an empty list shows the structure only.
        all_modules: whether modules without parameters get a line.
        width: the line width in cells; longer lines are cut. By default as wide as needed, or as the terminal.
        ascii: whether to use ASCII only; by default if the output's encoding is not a Unicode one.

    Raises:
        TargetError: if the backbone is not a `torch.nn.Module`.
        OptionError: if a column is unknown, or `depth` or `width` is below 1.
    """
    if depth is not None and depth < 1:
        raise OptionError(f"show(depth={depth}): expected at least 1; omit it for no limit")
    return View(cut(build(backbone, fold=fold, all_modules=all_modules), depth), tuple(columns), width, ascii)


@checked
class Visualization:
    """OpenDelta's name for the tree: `Visualization(model).structure_graph()` prints it."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    def structure_graph(
        self,
        *,
        rootname: str = "root",
        columns: Sequence[str] = (),
        print_tree: bool = True,
        all_modules: bool = False,
    ) -> View:
        """Returns the tree and prints it.

        Args:
            rootname: the name on the first line.
            columns: as for `show`; by default none, as in OpenDelta.
            print_tree: whether to print the tree.
            all_modules: whether modules without parameters get a line.

        Raises:
            OptionError: if a column is unknown.
        """
        view = View(build(self.backbone, root=rootname, all_modules=all_modules), tuple(columns))
        if print_tree:
            Console(highlight=False).print(view, soft_wrap=True)
        return view
