"""Writes a tree as plain data for JSON: one object for each row, with its rows inside."""

from collections.abc import Iterator
from typing import Any

from deltakit.view.node import DeltaLine, Node, Weight
from deltakit.view.tree_rows import Row, rows, state_of


def data(node: Node) -> dict[str, Any]:
    """Returns the totals of a tree and its root row, all in types of JSON."""
    sizes = node.sizes
    return {
        "parameters": sizes.parameters,
        "in_deltas": sizes.delta,
        "trainable": sizes.total_trained,
        "root": _row(node, iter(rows(node)), 1, 1),
    }


def _row(node: Node, found: Iterator[Row], modules: int, times: int) -> dict[str, Any]:
    row = next(found)
    modules, times = modules * node.members, times * (1 if node.twins else node.members)
    alias = None if node.alias is None else row.tied[""]
    deltas = [_delta(line, modules, times) for line in node.deltas if next(found)]
    children = [_row(child, found, modules, times) for child in node.children]
    if node.hidden:
        next(found)
    return {
        "names": list(node.names),
        "types": list(node.types),
        "selector": row.selector or None,
        "modules": modules,
        "parameters": node.sizes.parameters * times,
        "parameters_in_each": node.sizes.parameters,
        "state": state_of(node),
        **({"kernel": node.detail} if node.detail else {}),
        **({"tied_together": True} if node.twins else {}),
        **({"same_module_as": alias} if alias is not None else {}),
        **({"bytes": node.sizes.bytes * times} if node.sizes.bytes else {}),
        **_calls(node, modules),
        "weights": [
            {**_weight(weight), **({"tied_to": row.tied[weight.name]} if weight.name in row.tied else {})}
            for weight in node.weights
            if not weight.is_buffer
        ],
        **_some("buffers", [_weight(weight) for weight in node.weights if weight.is_buffer]),
        **_some("deltas", deltas),
        **_some("children", children),
        **({"rows_left_out": node.hidden} if node.hidden else {}),
        **({"modules_filtered_out": node.left_out * modules} if node.left_out else {}),
    }


def _calls(node: Node, modules: int) -> dict[str, Any]:
    if node.calls is None:
        return {}
    shapes = [list(shape) for shape in node.calls.shapes]
    return {"calls_of_each": node.calls.times, "outputs": shapes, "flops": node.calls.flops * modules}


def _delta(line: DeltaLine, modules: int, times: int) -> dict[str, Any]:
    return {
        "name": line.label,
        "summary": line.summary,
        "modules": modules,
        "parameters": line.count * times,
        "parameters_in_each": line.count,
        "trainable": bool(line.trained),
        "state": {"": "active", "off": "inactive"}.get(line.idle, line.idle),
        **({"bytes": line.bytes * times} if line.bytes else {}),
        "weights": [_weight(weight) for weight in line.weights],
    }


def _weight(weight: Weight) -> dict[str, Any]:
    return {
        "name": weight.name,
        "shape": None if weight.shape is None else list(weight.shape),
        "dtype": weight.dtype,
        "trainable": weight.trainable,
        **({"device": weight.device} if weight.device else {}),
    }


def _some(key: str, values: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: values} if values else {}
