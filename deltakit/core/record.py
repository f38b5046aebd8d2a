"""The state of a delta: its options, the sites of its modules, and the tensors that are kept for it.

All modules of a delta share one `Record`, so all handles on the delta see the same state, and a copy of the backbone gets a
copy of it. The record has no references to modules. Otherwise a deepcopy of one layer would copy the full backbone.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltakit.core.buffer_ledger import BufferLedger
from deltakit.core.delta_module import DeltaModule
from deltakit.core.extras import Extra
from deltakit.core.grad_ledger import GradLedger
from deltakit.core.held import held_in
from deltakit.core.method import Method
from deltakit.core.method_registry import label_among
from deltakit.core.normal_tensors import version_of
from deltakit.core.parts import path_with_part, word_of
from deltakit.core.paths import change_note, delta_children, join, noted, own_modules
from deltakit.core.roots import roots_inside
from deltakit.core.start_samples import Start

# Asking a target for the records of its deltas runs in C code: it may have hundreds.
_RECORD, _ORDER = attrgetter("record"), attrgetter("order")


@dataclass(eq=False)
class Record:
    """The options and the state of one delta.

    `order` is the time of its first attachment, by which deltas at one target are sorted; 0 before.
    """

    name: str
    methods: tuple[Method, ...]
    order: int
    freeze: bool
    named: bool = False
    """Whether the user chose the name. If not, it is changed when another delta has it."""
    train: tuple[str, ...] = ()
    """The selectors of the backbone modules that are fully trained."""
    left_out: tuple[dict[str, str], ...] = ()
    """For each method the default positions, and the layers in selected containers, that it cannot serve, with the reason."""
    notes: tuple[str, ...] = ()
    """For each method what is unusual about the choice of its targets. A loaded delta has no such notes."""
    active: bool = True
    scale: float = 1.0
    """Multiplies the delta's effect in forwards."""
    has_rows: bool = False
    """Whether rows of its backbone are in use: in a `rows` block of any thread, or by a graph that was made in one."""
    rows_in_use: set[int] = field(default_factory=set)
    """The ids of these rows."""
    open_blocks: set[int] = field(default_factory=set)
    """The ids of the mixed batches whose `rows` blocks have not ended."""
    unrooted: bool = False
    """Whether parts of the backbone were called alone inside a `rows` block: their graphs do not tell their rows."""
    checked: bool = False
    """Whether a first forward has shown that its targets are called."""
    compiled: bool = False
    """Whether compiled code called its delta modules in the forward that is being checked. True after the check."""
    trainable: bool = True
    only_full: bool = False
    """Whether the user froze its modules on purpose, and trains only what it trains fully."""
    start: Start | None = None
    """How its modules were when it was attached; None if they got values since, from a file or a state dict."""
    version: int = 0
    """What `Attachment.version` returned when the delta was attached."""
    grad_ledger: GradLedger = field(default_factory=GradLedger)
    buffer_ledger: BufferLedger = field(default_factory=BufferLedger)
    backbone_values: dict[str, Tensor] = field(default_factory=dict)
    """While the delta is attached: the backbone's own values of what it fully trains and of statistics that moved, by name."""
    trained_values: dict[str, Tensor] = field(default_factory=dict)
    """While the delta is detached: its own values of the same tensors, by name."""
    moved: set[str] = field(default_factory=set)
    """The names of the running statistics that moved while it was attached."""
    unsaved: set[str] = field(default_factory=set)
    """The names of those that no file has: buffers that a state dict does not have either, or that got another shape."""
    weights_before_merge: dict[str, Tensor] = field(default_factory=dict)
    """While the delta is merged: the original weights, by name."""
    unloaded: dict[str, Any] = field(default_factory=dict)
    """Once it is in the backbone's weights for good, and cannot be attached again: what identifies the backbone before."""
    narrowed: bool = False
    """Whether a filter narrows a state dict as long as it is attached."""
    extras: dict[str, Extra] = field(default_factory=dict)
    """What else its files hold, by the name of who keeps it there."""
    leaving: bool = False
    """Whether it is being detached. After an interruption it stays so, and `detach` does the rest."""

    @property
    def merged(self) -> bool:
        # Derived from the kept weights instead of stored, so that the two can never disagree.
        return bool(self.weights_before_merge)

    @property
    def fully_trained(self) -> list[str]:
        """The names of the backbone's tensors that the delta trains fully and saves, and of running statistics that moved."""
        return [name for name in self.backbone_values or self.trained_values if name not in self.unsaved]

    @property
    def live(self) -> bool:
        """Whether the delta takes part in forwards: active, and not merged into the weights."""
        # Not by `and not`: dynamo has no guard for the length of a dictionary whose `not` is returned (seen with torch 2.13),
        # so that compiled code would not notice a merge.
        return self.active if not self.weights_before_merge else False

    def set_merged(self, weights: dict[str, Tensor]) -> None:
        """Keeps the weights from before a merge; none of them after unmerging."""
        self.weights_before_merge = weights
        (self.grad_ledger.merged.add if weights else self.grad_ledger.merged.discard)(self.name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of a backbone is outside of the `rows` block, so nothing would ever end its mixed batch.
        return {**self.__dict__, "has_rows": False, "rows_in_use": set(), "open_blocks": set(), "unrooted": False}


class Site(NamedTuple):
    """One delta module, the path and module of its target, and the index of its method in the delta."""

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
        # Looked up in the target, because a deepcopy or `del target.name` changes it without telling the delta.
        children, record = self.target._modules, self.module.record
        if not children:
            return None
        usual = key_of(record, self.method, self.module.part) if isinstance(record, Record) else ""
        if children.get(usual) is self.module:
            return usual
        held = held_in(children)
        if held is not None and record not in held.records:
            # It is not looked for among the hundreds of delta modules of others.
            return None
        return next((key for key, child in children.items() if child is self.module), None)


@dataclass(eq=False)
class Attachment:
    """One delta on one backbone: its record and the sites of its modules, attached or not."""

    backbone: nn.Module
    record: Record
    sites: list[Site]
    scopes: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    """The modules whose hooks apply the weight patch of a delta module, known to the attachment that put them there."""

    @property
    def attached(self) -> bool:
        """Whether the delta modules are in the backbone, or some of them after an interruption or the user's changes."""
        return any(site.key is not None for site in self.sites)

    def version(self) -> int:
        """Returns a number that grows whenever a parameter of its delta modules is changed."""
        # Also of those that are never trained: they do not change.
        return sum(version_of(parameter) for site in self.sites for parameter in parameters_of(site.module).values())

    def named(self, site: Site, name: str) -> str:
        """Returns the name of a delta module's tensor in files: `path.method.tensor`."""
        # The delta's name is not part of it: a file can be loaded under any name (compare peft#2772 and peft#2699).
        return join(site.path, f"{label_of(self.record, site.method)}.{name}")

    def labels(self) -> list[str]:
        """Returns the name of each method in files."""
        return [label_of(self.record, index) for index in range(len(self.record.methods))]


def attachments_of(backbone: nn.Module) -> list[Attachment]:
    """Returns the deltas attached to a backbone or to parts of it, in their order. The `backbone` of each is its root."""
    inside = roots_inside(backbone)
    found = {record: Attachment(backbone, record, sites) for record, sites in _sites_of(backbone).items()}
    for record, (_, root) in inside.items():
        if record in found:
            found[record] = Attachment(root, record, _sites_of(root).get(record, found[record].sites))
    return sorted(found.values(), key=lambda attachment: attachment.record.order)


def _sites_of(backbone: nn.Module) -> dict[Record, list[Site]]:
    # Read from the module tree, not from a registry: so a deepcopy or an unpickled backbone has its deltas, too.
    found: dict[Any, list[Site]] = {}
    numbers: dict[tuple[Any, str, str], int] = {}
    for path, target in own_modules(backbone):
        for key, module in delta_children(target).items() if target._modules else ():
            record: Any = module.record
            part = module.part
            if record is None:
                continue
            # A delta has the same keys at nearly all of its targets.
            known = (record, key, part)
            if known not in numbers:
                numbers[known] = _method_index(record, key, part)
            site = Site(path_with_part(path, part) if part else path, target, module, numbers[known])
            found.setdefault(record, []).append(site)
    return found


def records_of(backbone: nn.Module) -> list[Record]:
    """Returns the records of the deltas attached to a backbone, in their order, without those attached to a part of it."""
    inside = roots_inside(backbone)
    return [record for record in records_in(backbone) if record not in inside]


def records_in(backbone: nn.Module) -> Mapping[Record, Any]:
    """Returns the records of the deltas on the modules of a backbone, as the keys, in their order."""
    return noted(backbone, "records", _records_in)


def note_record(backbone: nn.Module, record: Record) -> None:
    """Says that a delta gets delta modules in a backbone, so that `records_in` need not look at all modules again."""
    change_note(backbone, "records", lambda known: _in_order({*known, record}))


def _records_in(backbone: nn.Module) -> Mapping[Record, Any]:
    # In C code, and to a set, which takes a third of the time of a dictionary: a hundred targets may each have hundreds.
    found: set[Record] = set()
    for _, target in own_modules(backbone):
        if target._modules:
            found.update(records_at(target))
    return _in_order(found)


def _in_order(records: Collection[Record]) -> dict[Record, Any]:
    return dict.fromkeys(sorted(records, key=_ORDER))


def records_at(target: nn.Module) -> Mapping[Record, Any]:
    """Returns the records of the deltas on one module, as the keys."""
    held = held_in(target._modules)
    if held is not None and None not in held.records:
        # Not copied: a hundred modules may each have hundreds of deltas.
        return held.records
    deltas = delta_children(target)
    if not deltas:
        return {}
    found: dict[Any, None] = dict.fromkeys(map(_RECORD, deltas.values()))
    found.pop(None, None)
    return found


def label_of(record: Record, index: int) -> str:
    """Returns the name of the method `index` of a delta in files: the method's name, numbered from the second one on."""
    return label_among([method.name for method in record.methods], index)


def key_of(record: Record, index: int, part: str = "") -> str:
    """Returns the name under which a delta module of the method `index` is registered at its target.

    Args:
        part: the parameter or feature slice that it changes: one module may hold a delta module for each of several.
    """
    # One string for all targets: hooks list the keys of hundreds of deltas, and copying 56 such lists, each of strings of its
    # own, was a quarter of the time to detach one delta.
    return sys.intern(f"{record.name}_{label_of(record, index)}" + (f"_{word_of(part)}" if part else ""))


def keyed(record: Record, sites: Sequence[Site]) -> list[tuple[Site, str]]:
    """Returns the sites of a delta, each with the name under which its target holds the delta module, or would."""
    # Made once for all targets: nearly always they have the same.
    places = [(site.method, site.module.part) for site in sites]
    keys = {place: key_of(record, *place) for place in dict.fromkeys(places)}
    return [(site, keys[place]) for site, place in zip(sites, places, strict=True)]


def _method_index(record: Record, key: str, part: str) -> int:
    return next(index for index in range(len(record.methods)) if key_of(record, index, part) == key)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a delta module by name."""
    # Each attach and swap calls it for all delta modules, and most have no children: `named_parameters` is slower.
    if module._modules:
        return dict(module.named_parameters())
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Returns the shapes of a delta module's parameters by name."""
    return {name: parameter.shape for name, parameter in parameters_of(module).items()}
