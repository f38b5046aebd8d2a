"""The state of a delta: what it is, where its modules sit, and the values of what it trains whole.

The state that all its modules need stands in one `Record`, which they share; so every handle on one delta, and every
copy of its backbone, sees one consistent state.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltakit.core.delta_module import DeltaModule
from deltakit.core.grad_ledger import Ledger
from deltakit.core.method import Method
from deltakit.core.mixed_batch import Batch
from deltakit.core.paths import join, own_modules


@dataclass(eq=False)
class Record:
    """What one delta is and in which state."""

    name: str
    methods: tuple[Method, ...]
    order: int
    freeze: bool
    named: bool = False
    """Whether the user chose the name; if not, it gives way to another delta's."""
    train: tuple[str, ...] = ()
    """The selectors of the backbone modules that are trained whole."""
    active: bool = True
    scale: float = 1.0
    """How much of its effect it has in forwards."""
    batch: Batch | None = None
    """Which rows of a batch belong to which delta, while `rows` says so."""
    checked: bool = False
    """Whether a forward of the backbone has shown that its targets are called."""
    trainable: bool = True
    ledger: Ledger = field(default_factory=Ledger)
    whole: dict[str, Tensor] = field(default_factory=dict)
    """The other side's values of what is trained whole, by name: the backbone's own while the delta is attached, the
    trained ones while it is not."""
    merged: dict[str, Tensor] = field(default_factory=dict)
    """The weights as they were before merging, by name; empty when not merged."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a backbone is not in the block that holds its rows.
        return {**self.__dict__, "batch": None}


class Site(NamedTuple):
    """One delta module and its place: the target's path and module, and the index of its method in the delta."""

    path: str
    target: nn.Module
    module: DeltaModule
    method: int

    @property
    def owner(self) -> str:
        """The path of the target's module: the target's own path without the parameter or the rows."""
        return self.path.removesuffix(self.module.place).removesuffix(".") if self.module.place else self.path

    @property
    def key(self) -> str | None:
        """The name under which the target holds the delta module; None while it is detached."""
        return next((key for key, child in self.target._modules.items() if child is self.module), None)


def sites_of(backbone: nn.Module) -> dict[int, tuple[Record, list[Site]]]:
    """The deltas attached to a backbone, in their order, each with its sites; keyed by the id of the record."""
    found: dict[int, tuple[Record, list[Site]]] = {}
    for path, target in own_modules(backbone):
        for key, module in target._modules.items():
            if isinstance(module, DeltaModule) and module.record is not None:
                record = module.record
                site = Site(place_at(path, module.place), target, module, _method_index(record, key, module.place))
                found.setdefault(id(record), (record, []))[1].append(site)
    return dict(sorted(found.items(), key=lambda item: item[1][0].order))


def records_of(backbone: nn.Module) -> list[Record]:
    """What the deltas attached to a backbone are, in their order."""
    found: dict[int, Record] = {}
    for _, target in own_modules(backbone):
        for child in target._modules.values():
            if isinstance(child, DeltaModule) and child.record is not None:
                found[id(child.record)] = child.record
    return sorted(found.values(), key=lambda record: record.order)


def label_of(record: Record, index: int) -> str:
    """What the method `index` of a delta is called in files: its name, with a number if it is there twice."""
    method = record.methods[index].name
    earlier = sum(other.name == method for other in record.methods[:index])
    return f"{method}_{earlier + 1}" if earlier else method


def key_of(record: Record, index: int, place: str = "") -> str:
    """The name under which the delta modules of the method `index` are registered at their targets.

    `place` is the parameter, or the rows, of the target that it stands for: one module may hold several.
    """
    return f"{record.name}_{label_of(record, index)}" + (f"_{word_of(place)}" if place else "")


def word_of(place: str) -> str:
    """The place of a delta module on its target as a word.

    >>> word_of("in_proj_weight[q]")
    'in_proj_weight_q'
    """
    return re.sub(r"\W+", "_", place).strip("_")


def place_at(path: str, place: str) -> str:
    """The path of a parameter of the module at a path, or of rows of it.

    >>> place_at("h.0.attn.c_attn", "[q]"), place_at("mlp.experts", "down_proj")
    ('h.0.attn.c_attn[q]', 'mlp.experts.down_proj')
    """
    return path + place if place.startswith("[") else join(path, place) if place else path


def _method_index(record: Record, key: str, place: str) -> int:
    return next(index for index in range(len(record.methods)) if key_of(record, index, place) == key)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a delta module by name."""
    # Most delta modules are flat, and this is asked of all of them at each attach and swap.
    if module._modules:
        return dict(module.named_parameters())
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a delta module's parameters by name."""
    return {name: parameter.shape for name, parameter in parameters_of(module).items()}
