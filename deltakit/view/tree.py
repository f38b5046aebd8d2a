"""Builds a backbone's structure as plain data, one node for each module. `folding` folds equal parts; other files print it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deltakit.core import DeltaModule, LogicalParameter, is_slice, join, local_bytes, logical_parameters, word_of
from deltakit.view.collector import collector_paused
from deltakit.view.facts import dtype_of, kernel_of
from deltakit.view.node import DeltaLine, Node, Relative, Sizes, Weight, size_of

_Part = TypeVar("_Part", Weight, DeltaLine, Node, frozenset[str])


@collector_paused()
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


@dataclass
class _Builder:
    all_modules: bool
    buffers: bool
    devices: bool
    memory: bool
    weights: dict[int, str] = field(default_factory=dict)
    modules: dict[int, str] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)
    known: dict[object, Any] = field(default_factory=dict)
    """Each different part of the tree once. So a model of 58,000 modules has a few hundred nodes if its blocks are alike."""

    def node(self, module: nn.Module, name: str, path: str, order: int) -> Node:
        """Returns the node of a module."""
        kind = type(module).__name__
        first = self.modules.setdefault(id(module), path)
        if first != path:
            return self._once(Node((name,), (kind,), alias=relative(first, path), order=(order,)))
        # Before the children: a parameter belongs to the first module that has it.
        weights = self._weights(module, path)
        deltas = {key: child for key, child in module._modules.items() if isinstance(child, DeltaModule)}
        lines = [self._delta_line(key, delta) for key, delta in deltas.items()]
        own_bytes = self._bytes(module, deltas.values()) if self.memory else 0
        found = [
            self.node(child, key, f"{path}.{key}" if path else key, place)
            for place, (key, child) in enumerate(module._modules.items())
            if child is not None and key not in deltas
        ]
        kernel, ordered = kernel_of(module), isinstance(module, nn.Sequential)
        # Parts are the same objects where they are equal, so their ids tell them apart.
        ids = [tuple(map(id, part)) if part else () for part in (weights, lines, found)]
        facts = (name, kind, order, kernel, ordered, own_bytes, *ids)
        node = self.known.get(facts)
        if node is None:
            shown = tuple(child for child in found if self.all_modules or _is_shown(child))
            node = self.known[facts] = Node(
                (name,),
                (kind,),
                tuple(weights),
                tuple(lines),
                shown,
                _sum(weights, lines, found, own_bytes),
                kernel,
                order=(order,),
                dtypes=self._once(_dtypes(weights, lines, found)),
                devices=self._once(_devices(weights, lines, found)) if self.devices else frozenset(),
                ordered=ordered,
                omitted=_omitted(found, shown),
            )
        return node

    def _once(self, part: _Part) -> _Part:
        """Returns the part that is equal to this one and was made first."""
        return self.known.setdefault(part, part)

    def _weights(self, module: nn.Module, path: str) -> list[Weight]:
        parameters = logical_parameters(module)
        if not parameters and not self.buffers:
            return []
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
        tied = None if owner is own or owner == own else relative(owner, own)
        return self._once(
            Weight(name, shape, dtype_of(stored), stored.requires_grad, tied, False, self._device(stored))
        )

    def _buffer(self, name: str, buffer: Tensor) -> Weight:
        shape = None if torch.nn.parameter.is_lazy(buffer) else buffer.shape
        return self._once(Weight(name, shape, dtype_of(buffer), False, is_buffer=True, device=self._device(buffer)))

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
        held = sum(map(local_bytes, (*module.parameters(), *module.buffers()))) if self.memory else 0
        return self._once(DeltaLine(label, " ".join(words).strip(), weights, idle, held))

    def _device(self, tensor: Tensor) -> str:
        return str(tensor.device) if self.devices else ""

    def _bytes(self, module: nn.Module, deltas: Iterable[DeltaModule]) -> int:
        own = [module, *(inner for delta in deltas for inner in delta.modules())]
        tensors = [t for one in own for t in (*one._parameters.values(), *one._buffers.values())]
        new = {id(t): t for t in tensors if t is not None and id(t) not in self.stored}
        self.stored |= new.keys()
        return sum(map(local_bytes, new.values()))


def relative(owner: str, path: str) -> Relative:
    """Returns the owner's path relative to another path."""
    there, here = owner.split("."), path.split(".")
    common = 0
    while common < min(len(there), len(here)) and there[common] == here[common]:
        common += 1
    return len(here) - common, tuple(there[common:])


def _dtypes(weights: Sequence[Weight], lines: Sequence[DeltaLine], children: Sequence[Node]) -> frozenset[str]:
    """Returns the dtypes of all parameters in a module."""
    own = {weight.dtype for weight in weights if not weight.is_buffer}
    own.update(weight.dtype for line in lines for weight in line.weights)
    return frozenset(own.union(*[child.dtypes for child in children]))


def _devices(weights: Sequence[Weight], lines: Sequence[DeltaLine], children: Sequence[Node]) -> frozenset[str]:
    """Returns the devices of all parameters in a module."""
    own = {weight.device for weight in weights if not weight.is_buffer}
    own.update(weight.device for line in lines for weight in line.weights)
    return frozenset(own.union(*[child.devices for child in children]))


def _sum(weights: Sequence[Weight], lines: Sequence[DeltaLine], children: Sequence[Node], own_bytes: int) -> Sizes:
    parameters = trained = 0
    for weight in weights:
        if weight.tied is None and not weight.is_buffer:
            size = size_of(weight)
            parameters += size
            trained += size if weight.trainable else 0
    own = Sizes(parameters, trained, bytes=own_bytes)
    if lines:
        own = own._replace(
            delta=sum(line.count for line in lines),
            delta_trained=sum(line.trained for line in lines),
            off=sum(line.count for line in lines if line.idle == "off"),
            merged=sum(line.count for line in lines if line.idle == "merged"),
        )
    return Sizes(*map(sum, zip(own, *[child.sizes for child in children], strict=True))) if children else own


def _is_shown(node: Node) -> bool:
    return bool(node.weights or node.deltas or node.children or node.alias is not None)


def _omitted(found: Sequence[Node], shown: Sequence[Node]) -> tuple[str, ...]:
    """The numbers that a reader of the children's names would miss."""
    if len(found) == len(shown):
        return ()
    last = max((node.order[0] for node in shown if node.names[0].isdigit()), default=-1)
    there = {node.order for node in shown}
    return tuple(n.names[0] for n in found if n.names[0].isdigit() and n.order not in there and n.order[0] < last)
