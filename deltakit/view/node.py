"""The plain data of a tree: nodes with the modules they stand for, their weights and their deltas."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from deltakit.view.calls import Calls

Relative = tuple[int, tuple[str, ...]]
"""A path relative to another: levels up, then names down. It is equal for equal positions in two blocks."""


class Weight(NamedTuple):
    """One parameter or buffer.

    The shape is that of the model, also if the weight is packed, and None for a lazy parameter. The dtype is the stored one.
    `tied` is where the parameter is that it is tied to. The device is "" unless it was asked for.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    trainable: bool
    tied: Relative | None = None
    is_buffer: bool = False
    device: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{list(self.shape) if self.shape is not None else '?'}"


@dataclass(frozen=True, slots=True)
class DeltaLine:
    """One delta module at its target: its label, its configuration, its parameters, and what keeps it from acting."""

    label: str
    summary: str
    weights: tuple[Weight, ...]
    idle: str = ""
    """ "off" if its delta is not active, "merged" if it is merged into the weights, else ""."""
    bytes: int = 0

    @property
    def count(self) -> int:
        """The number of its parameters."""
        return sum(map(size_of, self.weights))

    @property
    def trained(self) -> int:
        """The number of its parameters that require gradients."""
        return sum(size_of(weight) for weight in self.weights if weight.trainable)


class Sizes(NamedTuple):
    """Numbers of parameters in one module with all modules in it, each parameter counted once.

    `parameters` and `trained` are those of the backbone, `delta` and `delta_trained` those of its deltas. `off` and `merged`
    are those of deltas that are not active, or are merged into the weights. `bytes` is the memory of all tensors, buffers too;
    0 unless it was asked for.
    """

    parameters: int = 0
    trained: int = 0
    delta: int = 0
    delta_trained: int = 0
    off: int = 0
    merged: int = 0
    bytes: int = 0

    @property
    def total(self) -> int:
        """The parameters of the backbone and of its deltas."""
        return self.parameters + self.delta

    @property
    def total_trained(self) -> int:
        """The number of those that require gradients."""
        return self.trained + self.delta_trained


class Node(NamedTuple):
    """One line of the tree: the equal modules it stands for, and the contents of each.

    `sizes` are those of one of the modules. `alias` is set if this is another name of a module shown before: where that is.
    """

    names: tuple[str, ...]
    types: tuple[str, ...]
    weights: tuple[Weight, ...] = ()
    deltas: tuple[DeltaLine, ...] = ()
    children: tuple["Node", ...] = ()
    sizes: Sizes = Sizes()
    detail: str = ""
    """The kernel and the stride of a convolution."""
    alias: Relative | None = None
    order: tuple[int, ...] = (0,)
    """The positions of the modules among their siblings."""
    twins: tuple["Node", ...] = ()
    """The modules after the first one as they are alone, if they are tied to it: together they have its parameters once."""
    dtypes: frozenset[str] = frozenset()
    """Those of all parameters in it, its deltas' too."""
    devices: frozenset[str] = frozenset()
    ordered: bool = False
    """Whether the order of the children is that of execution (`nn.Sequential`)."""
    omitted: tuple[str, ...] = ()
    """The numbers of children that are not shown because they have no parameters, if others follow."""
    hidden: int = 0
    """The number of lines that a depth limit omitted."""
    left_out: int = 0
    """The number of modules below it that a filter left out."""
    calls: Calls | None = None
    """What each of the modules did in a forward, if there was one."""

    @property
    def members(self) -> int:
        """The number of modules on the line."""
        return len(self.names)


def cut(node: Node, depth: int | None) -> Node:
    """Returns the tree down to a depth, with the numbers of lines omitted below it. None keeps all levels."""
    if depth is None:
        return node
    if depth <= 0:
        return node._replace(children=(), hidden=sum(1 for child in node.children for _ in walk(child)))
    return node._replace(children=tuple(cut(child, depth - 1) for child in node.children))


def walk(node: Node) -> Iterator[Node]:
    """Yields the node and all nodes below it."""
    yield node
    for child in node.children:
        yield from walk(child)


def size_of(weight: Weight) -> int:
    """Returns the number of a weight's values; 0 if it is lazy."""
    return prod(weight.shape) if weight.shape is not None else 0
