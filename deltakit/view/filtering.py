"""Narrows a tree to what selectors match. Counts stay those of the whole model."""

from collections.abc import Collection

from torch import nn

from deltakit.core import Selector, join
from deltakit.errors import SelectorError
from deltakit.selection import BackboneIndex
from deltakit.view.node import Node, walk


def filtered(node: Node, backbone: nn.Module, selectors: Selector) -> Node:
    """Returns a tree, as `build` returns it, without the nodes that neither match nor have a matching node below them.

    A selector of a parameter or of a feature slice matches the module that holds it.

    Raises:
        SelectorError: if a selector is malformed or matches nothing, or no match has a row.
    """
    index = BackboneIndex(backbone)
    matches = {id(index.module_at(index.split(path)[0])[0]) for path in index.select(selectors)}
    # Every name: a module that is registered twice has two rows.
    paths = {path for path, module in index.by_path.items() if id(module) in matches}
    kept = _kept(node, "", paths)
    if kept is None:
        first = next(path for path in index.by_path if path in paths)
        raise SelectorError(
            f"show(filter={selectors!r}): what it matches, such as {first}, has no parameters, and so no row; "
            "pass all_modules=True"
        )
    return kept


def _kept(node: Node, path: str, matching: Collection[str]) -> Node | None:
    found = [(child, _kept(child, join(path, child.names[0]), matching)) for child in node.children]
    children = tuple(kept for _, kept in found if kept is not None)
    if not children and path not in matching:
        return None
    if not found:
        return node
    left_out = sum(kept.left_out if kept is not None else sum(1 for _ in walk(child)) for child, kept in found)
    # Missing numbers are those that the filter has left out, too.
    omitted = node.omitted if len(children) == len(found) else ()
    return node._replace(children=children, left_out=left_out, omitted=omitted)
