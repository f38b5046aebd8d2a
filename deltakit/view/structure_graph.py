"""OpenDelta's `Visualization(model).structure_graph()`: a tree that is printed when it is asked for."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from torch import nn

from deltakit.core import checked
from deltakit.view.display import View
from deltakit.view.folding import folded
from deltakit.view.tree import build


@dataclass(frozen=True, repr=False)
class PrintedView(View):
    """A tree that has been printed already, so that a notebook does not show it again below."""

    cell: int = -1
    """The number of the notebook's cell that printed it."""

    def __repr__(self) -> str:
        # What an interactive interpreter prints after each expression.
        return f"<tree of {self.node.types[0]}, printed above>"

    def _ipython_display_(self) -> None:
        if self.cell != _cell():
            _display(self._repr_mimebundle_())


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
        """Returns the tree and prints it; in a notebook it is shown once, as HTML.

        Args:
            rootname: the name on the first line.
            columns: as for `show`; by default none, as in OpenDelta.
            print_tree: whether to print the tree.
            all_modules: whether modules without parameters get a line.

        Raises:
            OptionError: if a column is unknown.
        """
        tree = build(
            self.backbone,
            root=rootname,
            all_modules=all_modules,
            devices="device" in columns,
            memory="bytes" in columns,
        )
        view = View(folded(tree), tuple(columns))
        if not print_tree:
            return view
        console = Console(highlight=False)
        if console.is_jupyter:
            _display(view._repr_mimebundle_())
        else:
            for line in view._lines(console.width if console.is_terminal else None, console.encoding):
                console.print(line.styled(), soft_wrap=True)
        return PrintedView(view.node, view.columns, cell=_cell())


def _cell() -> int:
    """The number of the cell that runs; -1 outside of IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return -1 if shell is None else int(shell.execution_count)


def _display(bundle: dict[str, str]) -> None:
    from IPython.display import display

    display(bundle, raw=True)
