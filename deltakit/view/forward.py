"""Fills a tree with what each module does in one forward."""

from collections.abc import Mapping

from torch import nn

from deltakit.core import Inputs, is_callable, join, own_modules, trial_call
from deltakit.injection import Recorded, recorded_calls
from deltakit.view.calls import Calls
from deltakit.view.node import Node


def with_calls(node: Node, backbone: nn.Module, inputs: Inputs) -> Node:
    """Returns a tree, as `build` returns it, with what each module did in one forward without gradients.

    Raises:
        OptionError: if the forward raises an exception.
    """
    # Lists and dictionaries of modules have no forward.
    modules = {path: module for path, module in own_modules(backbone) if is_callable(module)}
    with recorded_calls(modules) as found:
        trial_call(backbone, inputs, where="show")
    return _filled(node, "", found)


def _filled(node: Node, path: str, found: Mapping[str, Recorded]) -> Node:
    record = found.get(path)
    calls = None if record is None or node.alias is not None else Calls(record.times, record.shapes, record.flops)
    children = tuple(_filled(child, join(path, child.names[0]), found) for child in node.children)
    return node._replace(calls=calls, children=children)
