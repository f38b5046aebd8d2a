"""Builds a backbone's structure as plain data, one node for each module. `folding` folds equal parts; other files print it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltakit.core import DeltaModule, LogicalParameter, is_slice, join, logical_parameters, word_of
from deltakit.view.facts import dtype_of, kernel_of, stored_bytes

Relative = tuple[int, tuple[str, ...]]
"""A path relative to another: levels up, then names down. It is equal for equal positions in two blocks."""


@dataclass(frozen=True, slots=True)
class Weight:
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
        return sum(map(_size, self.weights))

    @property
    def trained(self) -> int:
        """The number of its parameters that require gradients."""
        return sum(_size(weight) for weight in self.weights if weight.trainable)


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


@dataclass(frozen=True, slots=True)
class Node:
    """One line of the tree: the equal modules it stands for, and the contents of each.

    `sizes` are those of one of the modules. `alias` is set if this is another name of a module shown before: where that is.
    """

    names: tuple[str, ...]
    types: tuple[str, ...]
    weights: tuple[Weight, ...] = ()
    deltas: tuple[DeltaLine, ...] = ()
    children: tuple["Node", ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
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

    @property
    def members(self) -> int:
        """The number of modules on the line."""
        return len(self.names)

    @property
    def count(self) -> int:
        """The number of the backbone's parameters in one of the modules."""
        return self.sizes.parameters

    @property
    def trained(self) -> int:
        """The number of those that require gradients."""
        return self.sizes.trained

    @property
    def delta(self) -> int:
        """The number of parameters in the deltas of one of the modules."""
        return self.sizes.delta

    @property
    def delta_trained(self) -> int:
        """The number of those that require gradients."""
        return self.sizes.delta_trained


def build(
    backbone: nn.Module,
    *,
    root: str = "root",
    all_modules: bool = False,
    buffers: bool = False,
    devices: bool = False,
    memory: bool = False,
) -> Node:
    """Returns the tree of a backbone, with one node for each module.

    Args:
        root: the name on the first line.
        all_modules: whether modules without any parameter get a line.
        buffers: whether buffers are listed.
        devices: whether weights say on which device they are.
        memory: whether `Sizes.bytes` is filled.
    """
    return _Builder(all_modules, buffers, devices, memory).node(backbone, root, "", 0)


def cut(node: Node, depth: int | None) -> Node:
    """Returns the tree down to a depth, with the numbers of lines omitted below it. None keeps all levels."""
    if depth is None:
        return node
    if depth <= 0:
        return replace(node, children=(), hidden=sum(1 for child in node.children for _ in walk(child)))
    return replace(node, children=tuple(cut(child, depth - 1) for child in node.children))


def walk(node: Node) -> Iterator[Node]:
    """Yields the node and all nodes below it."""
    yield node
    for child in node.children:
        yield from walk(child)


@dataclass
class _Builder:
    all_modules: bool
    buffers: bool
    devices: bool
    memory: bool
    weights: dict[int, str] = field(default_factory=dict)
    modules: dict[int, str] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)

    def node(self, module: nn.Module, name: str, path: str, order: int) -> Node:
        """Returns the node of a module."""
        kind = type(module).__name__
        first = self.modules.setdefault(id(module), path)
        if first != path:
            return Node((name,), (kind,), alias=relative(first, path), order=(order,))
        # Before the children: a parameter belongs to the first module that has it.
        weights = self._weights(module, path)
        deltas = {key: child for key, child in module._modules.items() if isinstance(child, DeltaModule)}
        lines = tuple(self._delta_line(key, delta) for key, delta in deltas.items())
        own_bytes = self._bytes(module, deltas.values()) if self.memory else 0
        found = [
            self.node(child, child_name, join(path, child_name), place)
            for place, (child_name, child) in enumerate(module._modules.items())
            if child is not None and not isinstance(child, DeltaModule)
        ]
        children = tuple(child for child in found if self.all_modules or _is_shown(child))
        own = [w for w in (*weights, *(w for line in lines for w in line.weights)) if not w.is_buffer]
        return Node(
            (name,),
            (kind,),
            tuple(weights),
            lines,
            children,
            _sum(weights, lines, found, own_bytes),
            kernel_of(module),
            order=(order,),
            dtypes=frozenset(weight.dtype for weight in own).union(*(child.dtypes for child in found)),
            devices=frozenset(weight.device for weight in own).union(*(child.devices for child in found)),
            ordered=isinstance(module, nn.Sequential),
            omitted=_omitted(found, children),
        )

    def _weights(self, module: nn.Module, path: str) -> list[Weight]:
        parameters = logical_parameters(module)
        weights = [self._weight(parameter, path) for parameter in parameters]
        if self.buffers:
            packed = {id(parameter.stored) for parameter in parameters}
            held = [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
            weights += [self._buffer(name, buffer) for name, buffer in held if id(buffer) not in packed]
        return weights

    def _weight(self, parameter: LogicalParameter, path: str) -> Weight:
        name, shape, stored = parameter
        own = join(path, name)
        owner = self.weights.setdefault(id(stored), own)
        tied = None if owner == own else relative(owner, own)
        return Weight(name, shape, dtype_of(stored), stored.requires_grad, tied, device=self._device(stored))

    def _buffer(self, name: str, buffer: Tensor) -> Weight:
        shape = None if torch.nn.parameter.is_lazy(buffer) else buffer.shape
        return Weight(name, shape, dtype_of(buffer), False, is_buffer=True, device=self._device(buffer))

    def _delta_line(self, key: str, module: DeltaModule) -> DeltaLine:
        record = module.record
        label = key.removeprefix(f"{record.name}_") if record is not None else key
        if record is not None and record.named:
            label = f"{record.name}:{label}"
        if module.part:
            label = label.removesuffix(f"_{word_of(module.part)}")
            label += module.part if is_slice(module.part) else f" {module.part}"
        weights = tuple(
            Weight(name, tuple(p.shape), dtype_of(p), p.requires_grad, device=self._device(p))
            for name, p in module.named_parameters()
        )
        words = [module.summary(), *([f"scale={module.strength:g}"] if module.strength != 1 else [])]
        words += ["weight patch"] if module.weight_read is not None else []
        merged = record is not None and bool(record.weights_before_merge)
        idle = "" if module.live else "merged" if merged else "off"
        held = sum(map(stored_bytes, (*module.parameters(), *module.buffers()))) if self.memory else 0
        return DeltaLine(label, " ".join(words).strip(), weights, idle, held)

    def _device(self, tensor: Tensor) -> str:
        return str(tensor.device) if self.devices else ""

    def _bytes(self, module: nn.Module, deltas: Iterable[DeltaModule]) -> int:
        own = [module, *(inner for delta in deltas for inner in delta.modules())]
        tensors = [t for one in own for t in (*one._parameters.values(), *one._buffers.values())]
        new = {id(t): t for t in tensors if t is not None and id(t) not in self.stored}
        self.stored |= new.keys()
        return sum(map(stored_bytes, new.values()))


def relative(owner: str, path: str) -> Relative:
    """Returns the owner's path relative to another path."""
    there, here = owner.split("."), path.split(".")
    common = 0
    while common < min(len(there), len(here)) and there[common] == here[common]:
        common += 1
    return len(here) - common, tuple(there[common:])


def _sum(weights: Sequence[Weight], lines: Sequence[DeltaLine], children: Sequence[Node], own_bytes: int) -> Sizes:
    own = [weight for weight in weights if weight.tied is None and not weight.is_buffer]
    mine = Sizes(
        sum(map(_size, own)),
        sum(_size(weight) for weight in own if weight.trainable),
        sum(line.count for line in lines),
        sum(line.trained for line in lines),
        sum(line.count for line in lines if line.idle == "off"),
        sum(line.count for line in lines if line.idle == "merged"),
        own_bytes,
    )
    return Sizes(*map(sum, zip(mine, *(child.sizes for child in children), strict=True))) if children else mine


def _size(weight: Weight) -> int:
    return torch.Size(weight.shape).numel() if weight.shape is not None else 0


def _is_shown(node: Node) -> bool:
    return bool(node.weights or node.deltas or node.children or node.alias is not None)


def _omitted(found: Sequence[Node], shown: Sequence[Node]) -> tuple[str, ...]:
    """The numbers that a reader of the children's names would miss."""
    if len(found) == len(shown):
        return ()
    last = max((node.order[0] for node in shown if node.names[0].isdigit()), default=-1)
    there = {node.order for node in shown}
    return tuple(n.names[0] for n in found if n.names[0].isdigit() and n.order not in there and n.order[0] < last)
