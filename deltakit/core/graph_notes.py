"""Notes on autograd graphs: which mixed batches a forward of the backbone was run with, and which ids and mask it got.

Gradient checkpointing runs parts of a forward again in the backward pass. That may be after the `rows` block, in another
block, or in one of autograd's own threads, so the caller says nothing about the forward. But autograd knows which node it
works on, and this node is of the forward's own graph: the `CheckpointFunction` of reentrant checkpointing, or else the node
whose saved tensor is asked for. Its `metadata` is a dict that torch keeps on the node itself, also while Python has no
reference.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROWS, CALL = "deltakit_rows", "deltakit_call"
"""The notes: the rows of the caller, and the backbone's call."""
_OUTSIDE = "deltakit_outside"

# torch has no public function for these two.
_graph_task, _node_now = torch._C._current_graph_task_id, torch._C._current_autograd_node


def in_backward() -> bool:
    """Returns whether this thread is in a backward pass."""
    return bool(_graph_task() != -1)


def noted(name: str) -> Any:
    """Returns the note of this name on the node that the backward pass of this thread works on; None without one."""
    node: Any = _node_now()
    return node.metadata.get(name) if node is not None else None


def mark_inputs(inputs: Any, backbone: nn.Module) -> None:
    """Marks the graph of a forward's inputs as not of this forward.

    Args:
        inputs: its arguments, in any containers.
        backbone: the module that is called.
    """
    for tensor in _tensors(inputs, set()):
        node: Any = tensor.grad_fn
        if node is not None:
            node.metadata[_OUTSIDE, id(backbone)] = True


def note(outputs: Any, backbone: nn.Module, name: str, value: Any) -> bool:
    """Writes a note on all nodes of a forward's graph that have none of this name.

    A node takes about 2 us (measured). Nodes of the parameters are left out: they outlive the graph.

    Args:
        outputs: what the forward returned, in any containers.
        backbone: the module that was called.
        name: the name of the note.
        value: the note.

    Returns:
        whether the forward returned any tensor.
    """
    outside, seen = (_OUTSIDE, id(backbone)), set()
    nodes: list[Any] = [tensor.grad_fn for tensor in _tensors(outputs, set())]
    found = bool(nodes)
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        metadata = node.metadata
        # Behind the note of another forward nothing is of this one. Behind the same note there may be: a part of the backbone
        # that is observed itself has noted its own graph.
        if outside in metadata or metadata.setdefault(name, value) is not value:
            continue
        nodes += [following for following, _ in node.next_functions]
    return found


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yields the tensors in containers and objects, such as a transformers output with a cache."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, str | nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, seen)
