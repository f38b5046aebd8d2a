"""Builds a backbone's structure as plain data, one node for each module. `folding` folds equal parts; other files print it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltakit.core import DeltaModule, LogicalParameter, is_slice, join, local_bytes, logical_parameters, word_of
from deltakit.view.facts import dtype_of, kernel_of
from deltakit.view.node import DeltaLine, Node, Relative, Sizes, Weight, size_of


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
        held = sum(map(local_bytes, (*module.parameters(), *module.buffers()))) if self.memory else 0
        return DeltaLine(label, " ".join(words).strip(), weights, idle, held)

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


def _sum(weights: Sequence[Weight], lines: Sequence[DeltaLine], children: Sequence[Node], own_bytes: int) -> Sizes:
    own = [weight for weight in weights if weight.tied is None and not weight.is_buffer]
    mine = Sizes(
        sum(map(size_of, own)),
        sum(size_of(weight) for weight in own if weight.trainable),
        sum(line.count for line in lines),
        sum(line.trained for line in lines),
        sum(line.count for line in lines if line.idle == "off"),
        sum(line.count for line in lines if line.idle == "merged"),
        own_bytes,
    )
    return Sizes(*map(sum, zip(mine, *(child.sizes for child in children), strict=True))) if children else mine


def _is_shown(node: Node) -> bool:
    return bool(node.weights or node.deltas or node.children or node.alias is not None)


def _omitted(found: Sequence[Node], shown: Sequence[Node]) -> tuple[str, ...]:
    """The numbers that a reader of the children's names would miss."""
    if len(found) == len(shown):
        return ()
    last = max((node.order[0] for node in shown if node.names[0].isdigit()), default=-1)
    there = {node.order for node in shown}
    return tuple(n.names[0] for n in found if n.names[0].isdigit() and n.order not in there and n.order[0] < last)
