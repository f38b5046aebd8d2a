"""Visualization: OpenDelta's tree of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deltakit.core import checked
from deltakit.errors import warn
from deltakit.view import View
from deltakit.view import Visualization as Tree


@checked
class Visualization(Tree):
    """The tree of a model: `Visualization(model).structure_graph()` prints it."""

    def __init__(self, plm: nn.Module) -> None:
        super().__init__(plm)

    def structure_graph(  # type: ignore[override]  # OpenDelta's arguments come first
        self,
        rootname: str = "root",
        expand_params: bool = False,
        keep_non_params: bool = False,
        common_structure: bool = False,
        mapping: Mapping[str, Any] | None = None,
        only_common: bool = False,
        printTree: bool = True,  # noqa: N803  # OpenDelta's name
        *,
        columns: Sequence[str] = (),
        print_tree: bool = True,
    ) -> View:
        """Returns the tree and prints it.

        `expand_params`, `common_structure`, `mapping` and `only_common` have no effect, which is a warning.

        Args:
            rootname: the name on the first line.
            keep_non_params: whether modules without parameters get a line.
            printTree: whether to print the tree.
            columns: as for `deltakit.show`; by default none.
            print_tree: the same as `printTree`; both must be True to print it.

        Raises:
            OptionError: if a column is unknown.
        """
        given = {
            "expand_params": expand_params,
            "common_structure": common_structure,
            "mapping": mapping,
            "only_common": only_common,
        }
        without = [name for name, value in given.items() if value]
        if without:
            warn(f"structure_graph: {', '.join(without)} has no effect; the tree has the model's own names")
        return super().structure_graph(
            rootname=rootname, columns=columns, print_tree=print_tree and printTree, all_modules=keep_non_params
        )
