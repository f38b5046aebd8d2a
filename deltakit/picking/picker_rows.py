"""The rows of a picker: those of the model's tree, where only the members of lists are folded."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from deltakit.core import fold, join
from deltakit.view import Node, Row, build, folded, rows


@dataclass(frozen=True)
class PickerRow:
    """One row: a module, or the equal members of a list.

    `number` is its place among the rows, `parent` that of the row around it (-1 at the top), `paths` are those of its
    modules, none if they are other names of modules elsewhere. Rows with the same `same_name` have the same name: for
    members of lists, those of the same class in lists of the same name.
    """

    number: int
    parent: int
    depth: int
    label: str
    path: str
    paths: tuple[str, ...]
    same_name: tuple[str, ...]
    name: str
    """What `same_name` stands for, in words."""


def picker_rows(backbone: nn.Module) -> tuple[PickerRow, ...]:
    """Returns the rows of a backbone, without the backbone itself and without modules that have no parameters."""
    node = folded(build(backbone), indices_only=True)
    # In the order of the nodes, with rows for deltas between them.
    own_rows = iter([row for row in rows(node) if row.state != "delta"])
    next(own_rows)
    found: list[PickerRow] = []
    for child in node.children:
        _add(found, child, own_rows, -1, ("",), "")
    return tuple(found)


def _add(
    found: list[PickerRow], node: Node, own_rows: Iterator[Row], parent: int, around: tuple[str, ...], list_name: str
) -> None:
    number = len(found)
    paths = tuple(join(path, name) for path in around for name in node.names)
    same = (f"{list_name}.*", *node.types[:1]) if node.names[0].isdecimal() else node.names
    depth = found[parent].depth + 1 if parent >= 0 else 0
    name = " ".join(same) if len(same) > 1 else same[0]
    own = () if node.alias is not None else paths
    row = next(own_rows)
    label = row.label + (f"  ×{len(own)}" if len(own) > 1 else "")
    found.append(PickerRow(number, parent, depth, label, row.selector or ", ".join(fold(paths)), own, same, name))
    for child in node.children:
        _add(found, child, own_rows, number, paths, "*" if node.names[0].isdecimal() else node.names[0])
