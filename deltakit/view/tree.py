"""Builds a backbone's structure as plain data, with equal parts folded. Other files print it.

Two parts are equal if everything that their lines show is equal: types, parameters' names, shapes, dtypes, whether they
are trainable, what they are tied to, and the deltas. Each subtree gets a number by a key of exactly these facts and of its
children's numbers. So one pass is enough, and no two different subtrees can share a number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from deltakit.core import DeltaModule, LogicalParameter, is_plain, is_slice, join, logical_parameters, span, word_of


@dataclass(frozen=True)
class Weight:
    """One parameter.

    The shape is that of the model, also if the weight is packed, and None for a lazy parameter. The dtype is the stored one.
    `tied` is the path of the parameter it is tied to.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    trainable: bool
    tied: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{list(self.shape) if self.shape is not None else '?'}"


@dataclass(frozen=True)
class DeltaLine:
    """One delta module at its target: its label, its configuration and its parameters."""

    label: str
    summary: str
    weights: tuple[Weight, ...]
    active: bool

    @property
    def count(self) -> int:
        return sum(_size(weight) for weight in self.weights)


@dataclass(frozen=True)
class Node:
    """One line of the tree: the equal modules it stands for, and the contents of each.

    `count` and `trained` are numbers of parameters in one of the modules, each parameter counted once. `delta` and
    `delta_trained` are those of its deltas, which `count` does not include. `alias` is set if this is another name of a
    module shown before; it is that module's path.
    """

    names: tuple[str, ...]
    types: tuple[str, ...]
    weights: tuple[Weight, ...]
    deltas: tuple[DeltaLine, ...]
    children: tuple["Node", ...]
    count: int
    trained: int
    delta: int
    delta_trained: int
    alias: str = ""
    hidden: int = 0
    """The number of lines that a depth limit omitted."""

    @property
    def members(self) -> int:
        return len(self.names)

    @property
    def title(self) -> str:
        """The names with their types, such as `encoder (T5Stack)`, `q,k,v(Linear)` or `1-23(T5Block)`."""
        if len(set(self.types)) > 1:
            return ",".join(f"{name}({kind})" for name, kind in zip(self.names, self.types, strict=True))
        if self.members > 1:
            return f"{span(self.names)}({self.types[0]})"
        return f"{self.names[0]} ({self.types[0]})"


def build(backbone: nn.Module, *, fold: bool = True, root: str = "root", all_modules: bool = False) -> Node:
    """Returns the tree of a backbone.

    Args:
        fold: whether equal siblings share one line.
        root: the name on the first line.
        all_modules: whether modules without any parameter get a line.
    """
    node, _ = _Builder(fold, all_modules).node(backbone, root, "")
    return node


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
    fold: bool
    all_modules: bool
    classes: dict[object, int] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)
    modules: dict[int, str] = field(default_factory=dict)

    def node(self, module: nn.Module, name: str, path: str) -> tuple[Node, int]:
        """Returns the node of a module, and the number that all equal subtrees share."""
        kind = type(module).__name__
        if id(module) in self.modules:
            first = self.modules[id(module)]
            node = Node((name,), (kind,), (), (), (), 0, 0, 0, 0, alias=first or "root")
            return node, self._class(("alias", kind, _relative(first, path)))
        self.modules[id(module)] = path
        weights = [self._weight(parameter, path) for parameter in logical_parameters(module)]
        lines = [_delta_line(key, child) for key, child in module._modules.items() if isinstance(child, DeltaModule)]
        found = [
            self.node(child, child_name, join(path, child_name))
            for child_name, child in module._modules.items()
            if child is not None and not isinstance(child, DeltaModule)
        ]
        shown = [(node, number) for node, number in found if self.all_modules or _is_shown(node)]
        children = (
            self._folded(shown, contiguous=isinstance(module, nn.Sequential)) if self.fold else [n for n, _ in shown]
        )
        key = (kind, tuple(key for _, key in weights), tuple(lines), tuple((n.names, number) for n, number in shown))
        return _sum(name, kind, [w for w, _ in weights], lines, children), self._class(key)

    def _class(self, key: object) -> int:
        return self.classes.setdefault(key, len(self.classes))

    def _weight(self, parameter: LogicalParameter, path: str) -> tuple[Weight, object]:
        name, shape, stored = parameter
        own = join(path, name)
        owner = self.weights.setdefault(id(stored), own)
        dtype = str(stored.dtype).removeprefix("torch.")
        weight = Weight(name, shape, dtype, stored.requires_grad, tied="" if owner == own else owner)
        return weight, (replace(weight, tied=""), _relative(owner, own) if weight.tied else None)

    def _folded(self, found: Sequence[tuple[Node, int]], *, contiguous: bool) -> list[Node]:
        """Equal siblings as one node at the position of the first; in a Sequential only neighbours, because order matters."""
        groups: list[list[Node]] = []
        by_number: dict[int, list[Node]] = {}
        by_name: dict[str, list[Node]] = {}
        for node, number in found:
            if not is_plain(node.names[0]):
                # A comma or a range in a name would make the line ambiguous.
                by_number, by_name = ({}, {}) if contiguous else (by_number, by_name)
                groups.append([node])
                continue
            members = by_number.get(number) or by_name.get(_owner_of_weights(node) or "")
            if members is None:
                if contiguous:
                    # Only the last group takes more members.
                    by_number, by_name = {}, {}
                groups.append([node])
                by_number[number] = by_name[node.names[0]] = groups[-1]
            else:
                members.append(node)
        return [_together(members) for members in groups]


def _relative(owner: str, path: str) -> tuple[int, tuple[str, ...]]:
    """The owner's path relative to `path`: levels up, then names down. It is equal for equal positions in two blocks."""
    there, here = owner.split("."), path.split(".")
    common = 0
    while common < min(len(there), len(here)) and there[common] == here[common]:
        common += 1
    return len(here) - common, tuple(there[common:])


def _owner_of_weights(node: Node) -> str | None:
    """The module that owns all weights of a leaf, if they are tied to a single one: T5's `shared` for `lm_head`."""
    owners = {weight.tied.rpartition(".")[0] for weight in node.weights}
    return owners.pop() if len(owners) == 1 and not node.children and not node.deltas else None


def _together(members: Sequence[Node]) -> Node:
    first = members[0]
    if len(members) == 1:
        return first
    types = tuple(kind for node in members for kind in node.types)
    return replace(first, names=tuple(name for node in members for name in node.names), types=types)


def _delta_line(key: str, module: DeltaModule) -> DeltaLine:
    record = module.record
    label = key.removeprefix(f"{record.name}_") if record is not None else key
    if record is not None and record.named:
        label = f"{record.name}:{label}"
    if module.part:
        label = label.removesuffix(f"_{word_of(module.part)}")
        label += module.part if is_slice(module.part) else f" {module.part}"
    weights = tuple(
        Weight(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad)
        for name, p in module.named_parameters()
    )
    patch = " weight patch" if module.weight_read is not None else ""
    return DeltaLine(label, f"{module.summary()}{patch}".strip(), weights, module.live)


def _sum(name: str, kind: str, weights: list[Weight], lines: list[DeltaLine], children: list[Node]) -> Node:
    own = [weight for weight in weights if not weight.tied]
    # Members of different types are tied to each other, so they hold their parameters once.
    times = {id(child): 1 if len(set(child.types)) > 1 else child.members for child in children}
    return Node(
        names=(name,),
        types=(kind,),
        weights=tuple(weights),
        deltas=tuple(lines),
        children=tuple(children),
        count=sum(map(_size, own)) + sum(times[id(c)] * c.count for c in children),
        trained=sum(_size(w) for w in own if w.trainable) + sum(times[id(c)] * c.trained for c in children),
        delta=sum(line.count for line in lines) + sum(times[id(c)] * c.delta for c in children),
        delta_trained=sum(_size(w) for line in lines for w in line.weights if w.trainable)
        + sum(times[id(c)] * c.delta_trained for c in children),
    )


def _size(weight: Weight) -> int:
    return torch.Size(weight.shape).numel() if weight.shape is not None else 0


def _is_shown(node: Node) -> bool:
    return bool(node.weights or node.deltas or node.children or node.alias)
