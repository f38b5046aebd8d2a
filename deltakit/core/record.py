"""The state of a delta: what it is, where its modules sit, and the values that are kept for it.

What all modules of a delta need stands in one `Record`, which they share; so every handle on one delta, and every copy of its
backbone, sees one consistent state. The record holds no reference to modules: copying a part of a backbone stays cheap.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltakit.core.delta_module import DeltaModule
from deltakit.core.grad_ledger import GradLedger
from deltakit.core.method import Method
from deltakit.core.mixed_batch import MixedBatch
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
    """The selectors of the backbone modules that are fully trained."""
    active: bool = True
    scale: float = 1.0
    """Multiplies the delta's effect in forwards."""
    batch: MixedBatch | None = None
    """Which examples of a batch belong to which delta, inside a `rows` block."""
    checked: bool = False
    """Whether a forward of the backbone has shown that its targets are called."""
    trainable: bool = True
    grad_ledger: GradLedger = field(default_factory=GradLedger)
    backbone_values: dict[str, Tensor] = field(default_factory=dict)
    """While the delta is attached: the backbone's own values of what the delta trains fully, by name."""
    trained_values: dict[str, Tensor] = field(default_factory=dict)
    """While the delta is detached: the trained values of what it trains fully, by name."""
    weights_before_merge: dict[str, Tensor] = field(default_factory=dict)
    """While the delta is merged: the weights as they were before, by name."""

    @property
    def merged(self) -> bool:
        return bool(self.weights_before_merge)

    @property
    def fully_trained(self) -> list[str]:
        """The names of the backbone's tensors that the delta trains fully and saves."""
        return list(self.backbone_values or self.trained_values)

    @property
    def live(self) -> bool:
        """Whether the delta takes part in forwards: active, and not merged into the weights."""
        return self.active and not self.weights_before_merge

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a backbone is not in the block that holds its mixed batch.
        return {**self.__dict__, "batch": None}


class Site(NamedTuple):
    """One delta module and its place: the target's path and module, and the index of its method in the delta."""

    path: str
    target: nn.Module
    module: DeltaModule
    method: int

    @property
    def owner(self) -> str:
        """The path of the target's module: the target's own path without the parameter or the feature slice."""
        return self.path.removesuffix(self.module.part).removesuffix(".") if self.module.part else self.path

    @property
    def key(self) -> str | None:
        """The name under which the target holds the delta module; None while it is detached."""
        return next((key for key, child in self.target._modules.items() if child is self.module), None)


@dataclass(eq=False)
class Attachment:
    """One delta on one backbone: its record, and the sites of its modules. It may be attached or not."""

    backbone: nn.Module
    record: Record
    sites: list[Site]

    @property
    def attached(self) -> bool:
        """Whether the delta modules are in the backbone."""
        return self.sites[0].key is not None

    def named(self, site: Site, name: str) -> str:
        """The name that a tensor of a delta module has in files: `path.method.tensor`."""
        return join(site.path, f"{label_of(self.record, site.method)}.{name}")


def attachments_of(backbone: nn.Module) -> list[Attachment]:
    """The deltas attached to a backbone, in their order."""
    found: dict[int, Attachment] = {}
    for path, target, key, module in _delta_modules(backbone):
        record: Any = module.record
        site = Site(path_with_part(path, module.part), target, module, _method_index(record, key, module.part))
        found.setdefault(id(record), Attachment(backbone, record, [])).sites.append(site)
    return sorted(found.values(), key=lambda attachment: attachment.record.order)


def records_of(backbone: nn.Module) -> list[Record]:
    """The records of the deltas attached to a backbone, in their order."""
    found: dict[int, Any] = {id(module.record): module.record for *_, module in _delta_modules(backbone)}
    return sorted(found.values(), key=lambda record: record.order)


def _delta_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module, str, DeltaModule]]:
    for path, target in own_modules(backbone):
        for key, module in target._modules.items():
            if isinstance(module, DeltaModule) and module.record is not None:
                yield path, target, key, module


def label_of(record: Record, index: int) -> str:
    """What the method `index` of a delta is called in files: its name, with a number if it is there twice."""
    method = record.methods[index].name
    earlier = sum(other.name == method for other in record.methods[:index])
    return f"{method}_{earlier + 1}" if earlier else method


def key_of(record: Record, index: int, part: str = "") -> str:
    """The name under which the delta modules of the method `index` are registered at their targets.

    `part` is the parameter, or the feature slice, of the target that it stands for: one module may hold several.
    """
    return f"{record.name}_{label_of(record, index)}" + (f"_{word_of(part)}" if part else "")


def word_of(part: str) -> str:
    """The part of its target that a delta module stands for, as a word.

    >>> word_of("in_proj_weight[q]")
    'in_proj_weight_q'
    """
    return re.sub(r"\W+", "_", part).strip("_")


def path_with_part(path: str, part: str) -> str:
    """The path of a parameter of the module at a path, or of a feature slice of it.

    >>> path_with_part("h.0.attn.c_attn", "[q]"), path_with_part("mlp.experts", "down_proj")
    ('h.0.attn.c_attn[q]', 'mlp.experts.down_proj')
    """
    return path + part if part.startswith("[") else join(path, part) if part else path


def _method_index(record: Record, key: str, part: str) -> int:
    return next(index for index in range(len(record.methods)) if key_of(record, index, part) == key)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a delta module by name."""
    # Most delta modules are flat, and this is asked of all of them at each attach and swap.
    if module._modules:
        return dict(module.named_parameters())
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a delta module's parameters by name."""
    return {name: parameter.shape for name, parameter in parameters_of(module).items()}
