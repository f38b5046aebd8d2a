"""The hooks that look at a state dict before it is loaded into a backbone with deltas."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from deltakit.core import (
    DeltaModule,
    Record,
    above,
    join,
    notice_moved_buffers,
    own_modules,
    parent_of,
    records_of,
    rooted_at,
)
from deltakit.errors import StateError
from deltakit.injection.tables import ours, unhook


class ReportPart:
    """Reports the missing keys of a delta when a state dict has some of its tensors, but not all.

    A state dict without any tensor of a delta is a base checkpoint, and loads with `strict=True`.
    """

    def __call__(
        self,
        backbone: nn.Module,
        state: dict[str, Any],
        prefix: str,
        meta: Any,
        strict: bool,
        missing: list[str],
        *_: Any,
    ) -> None:
        held: dict[int, list[tuple[str, bool]]] = {}
        for path, module in backbone.named_modules(prefix=prefix.rstrip(".")):
            if isinstance(module, DeltaModule):
                keys = module.state_dict(prefix=f"{path}.")
                present = not keys.keys().isdisjoint(state)
                held.setdefault(id(module.record), []).extend((key, present) for key in keys)
        if not any(present for keys_of_delta in held.values() for _, present in keys_of_delta):
            _take_statistics(backbone, state, prefix)
        for keys_of_delta in held.values():
            if any(present for _, present in keys_of_delta):
                missing += [key for key, present in keys_of_delta if not present]


def _take_statistics(backbone: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Makes the buffers of a base checkpoint the backbone's own. Otherwise detaching would put the old ones back over them.

    Raises:
        StateError: if they are running statistics that a delta has moved.
    """
    records = records_of(backbone)
    for record in records[:1]:
        notice_moved_buffers(backbone, record)
        for other in records:
            for name in sorted(
                name for name in other.moved & other.backbone_values.keys() if f"{prefix}{name}" in state
            ):
                raise StateError(
                    f"{prefix}{name}: delta {other.name!r} has running statistics of its own here, which would be lost; "
                    "detach() the delta before loading the backbone's weights, or load a state dict that has the delta's own "
                    "tensors too"
                )
        for name, own in record.buffer_ledger.own.items():
            loaded = state.get(f"{prefix}{name}")
            if isinstance(loaded, torch.Tensor) and loaded.shape == own.shape:
                record.buffer_ledger.accept(name, loaded)


class RefuseLoading:
    """Raises an error when the backbone's weights are loaded into tensors that hold a delta's values.

    Those are the weights that a delta is merged into, and those that it fully trains: unmerging and detaching would restore
    the old values over the loaded ones. It stands on every module from the backbone down to those tensors, because a
    sub-module can be loaded alone.

    Args:
        path: the path of the module on which it stands.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.records: list[Record] = []

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        # When a module above is loaded, that one was asked, and it saw the complete state dict.
        if self.path and prefix:
            return
        for record in self.records:
            self._refuse(
                record.weights_before_merge,
                state,
                prefix,
                f"delta {record.name!r} is merged into this weight, and unmerging would restore the old weight; unmerge() the "
                "delta before loading the backbone's weights",
            )
            if not _has(module, record, state, prefix):
                self._refuse(
                    # `_take_statistics` looks for running statistics that moved: nobody may have noticed them yet.
                    record.backbone_values.keys() - record.moved - record.unsaved,
                    state,
                    prefix,
                    f"delta {record.name!r} fully trains this tensor, and detaching would restore the old value; detach() the "
                    "delta before loading the backbone's weights, or load a state dict that has the delta's own tensors too",
                )

    def _refuse(self, names: Iterable[str], state: dict[str, Any], prefix: str, why: str) -> None:
        above_it = join(self.path, "") if self.path else ""
        for name in sorted(names):
            if name.startswith(above_it) and prefix + name.removeprefix(above_it) in state:
                raise StateError(f"{prefix}{name}: {why}")


def _has(module: nn.Module, record: Record, state: dict[str, Any], prefix: str) -> bool:
    """Returns whether a state dict has tensors of a delta below a module: then it is a checkpoint with the delta."""
    paths = {
        path
        for path, child in module.named_modules(prefix=prefix.rstrip("."))
        if isinstance(child, DeltaModule) and child.record is record
    }
    return any(path in paths for name in state for path in above(parent_of(name)))


def refuse_loading(backbone: nn.Module, records: Iterable[Record], removed: Iterable[nn.Module]) -> None:
    """Registers `RefuseLoading` where it is needed for these deltas, and removes it where it is not.

    Args:
        removed: modules that the user took out of the backbone. They keep theirs until the delta is detached.
    """
    wanted: dict[str, list[Record]] = {}
    known = list(records)
    for record in known:
        names = (*record.weights_before_merge, *record.backbone_values.keys() - record.moved - record.unsaved)
        for path in dict.fromkeys(path for owner in dict.fromkeys(map(parent_of, names)) for path in above(owner)):
            wanted.setdefault(path, []).append(record)
    # A module may have several paths, and a guard for each.
    modules = list(own_modules(backbone, every_name=bool(wanted)))
    guarded = [(module, guard) for _, module in modules for guard in _guards(module)]
    for _, guard in guarded:
        guard.records = [record for record in guard.records if record not in known and not record.leaving]
    for path, module in modules if wanted else ():
        if path in wanted:
            here = next((guard for guard in _guards(module) if guard.path == path), None) or RefuseLoading(path)
            if here not in _guards(module):
                module.register_load_state_dict_pre_hook(here)
            here.records += wanted[path]
    for module in removed:
        for guard in _guards(module):
            guard.records = [record for record in guard.records if not record.leaving]
            guarded.append((module, guard))
    for module, guard in guarded:
        if not guard.records:
            unhook(module, [guard])


def _guards(module: nn.Module) -> list[RefuseLoading]:
    return ours(module, RefuseLoading) if module._load_state_dict_pre_hooks else []


def records_around(backbone: nn.Module) -> list[Record]:
    """Returns the records of deltas that have something in a backbone, and were attached to a module around it."""
    # A delta that only trains tensors here fully has no modules here, but guards.
    above_it = [record for guard in _guards(backbone) if guard.path for record in guard.records]
    here = rooted_at(backbone)
    there = [record for record in records_of(backbone) if record not in here]
    # What an interrupted detach has left is not held by any module.
    return [record for record in dict.fromkeys((*above_it, *there)) if not record.leaving]
