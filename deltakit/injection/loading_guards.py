"""The hooks that look at a state dict before it is loaded into a backbone with deltas."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from deltakit.core import (
    DeltaModule,
    Record,
    above,
    gathered,
    is_below,
    join,
    moved_in,
    notice_moved_buffers,
    own_modules,
    parent_of,
    records_of,
    relative,
    rooted_at,
    tensors_of,
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
        for keys_of_delta in held.values():
            if any(present for _, present in keys_of_delta):
                missing += [key for key, present in keys_of_delta if not present]


class RefuseLoading:
    """Raises an error when the backbone's weights are loaded into tensors that hold a delta's values.

    Those are the weights that a delta is merged into, those that it fully trains, and the running statistics that it moved:
    unmerging and detaching would restore the old values over the loaded ones. Statistics that no delta moved become the
    backbone's own. It stands on every module from the backbone down to those tensors, because a sub-module can be loaded
    alone.

    Args:
        path: the path of the module on which it stands.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.records: list[Record] = []
        self.tied: Mapping[str, str] = {}
        """The other names of these tensors in the backbone, each with the name by which a delta knows the tensor."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        # When a module above is loaded, that one was asked, and it saw the complete state dict.
        if self.path and prefix:
            return
        with_delta = [record for record in self.records if _has(module, record, state, prefix)]
        for record in self.records:
            self._refuse(
                record.weights_before_merge,
                state,
                prefix,
                f"delta {record.name!r} is merged into this weight, and unmerging would restore the old weight; unmerge() the "
                "delta before loading the backbone's weights",
            )
            if record not in with_delta:
                self._refuse(
                    # Running statistics that moved come below: nobody may have noticed them yet.
                    record.backbone_values.keys() - record.moved - record.unsaved,
                    state,
                    prefix,
                    f"delta {record.name!r} fully trains this tensor, and detaching would restore the old value; detach() the "
                    "delta before loading the backbone's weights, or load a state dict that has the delta's own tensors too",
                )
            elif not record.active:
                self._refuse_trained(module, record, state, prefix)
        if self.records and not with_delta:
            self._take_statistics(module, state, prefix)

    def _refuse_trained(self, module: nn.Module, record: Record, state: Mapping[str, Any], prefix: str) -> None:
        """Refuses a state dict that was saved while a delta was active, which now is not.

        What the delta had trained would become the backbone's own values.
        """
        own = dict(tensors_of(module)) if record.trained_values else {}
        for name in sorted(record.trained_values.keys() & {join(self.path, name) for name in own}):
            here, loaded = own[relative(name, self.path)], state.get(prefix + relative(name, self.path))
            if not isinstance(loaded, torch.Tensor) or loaded.shape != here.shape or loaded.is_meta or here.is_meta:
                continue
            if not torch.equal(gathered(loaded).to(here.device, here.dtype), gathered(here)):
                raise StateError(
                    f"{prefix}{name}: delta {record.name!r} fully trains this tensor and is not active, and the state dict "
                    "has the delta's own tensors and another value here than the backbone; set active = True before you load "
                    "a state dict that was saved while it was, or remove the delta's keys to load the backbone's own values"
                )

    def _take_statistics(self, module: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
        """Makes the buffers of a base checkpoint the backbone's own, unless a delta has moved them."""
        why = (
            "has running statistics of its own here, which would be lost; detach() the delta before loading the backbone's "
            "weights, or load a state dict that has the delta's own tensors too"
        )
        if not self.path:
            notice_moved_buffers(module, self.records[0])
        else:
            # Which of several deltas has moved them is only known on the whole backbone.
            active = " or ".join(repr(record.name) for record in self.records if record.active)
            self._refuse(moved_in(module, self.path, self.records), state, prefix, f"delta {active} {why}")
        for record in self.records:
            own = record.moved & record.backbone_values.keys()
            self._refuse(own, state, prefix, f"delta {record.name!r} {why}")
        ledger = self.records[0].buffer_ledger
        for name, value in list(ledger.own.items()):
            loaded = state.get(prefix + relative(name, self.path)) if is_below(name, self.path) else None
            if isinstance(loaded, torch.Tensor) and loaded.shape == value.shape:
                ledger.accept(name, loaded)

    def _refuse(self, names: Iterable[str], state: Mapping[str, Any], prefix: str, why: str) -> None:
        known = set(names)
        for name in sorted(known | {other for other, name in self.tied.items() if name in known}):
            if is_below(name, self.path) and prefix + relative(name, self.path) in state:
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
    # A set: there may be hundreds, and guards at hundreds of modules.
    known = dict.fromkeys(records)
    replaced = {record: _replaced(record) for record in known}
    tied = _other_names(backbone, {name for own in replaced.values() for name in own})
    for record, own in replaced.items():
        ledger = record.buffer_ledger
        if not (own or ledger.own):
            continue
        others = [other for other, name in tied.items() if name in own]
        names = (*own, *others, *ledger.own.keys() - ledger.unsaved)
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
            here.tied = tied
    for module in removed:
        for guard in _guards(module):
            guard.records = [record for record in guard.records if not record.leaving]
            guarded.append((module, guard))
    for module, guard in guarded:
        if not guard.records:
            unhook(module, [guard])


def hook_loading(backbone: nn.Module, kind: type[Any], make: Callable[[], Any] | None) -> Any:
    """Registers an object whose `before` and `after` are called around loading a state dict into a backbone.

    Args:
        make: makes the object, of the class `kind`, if none is there. None removes it.

    Returns:
        The object that is there; None if there is none.
    """
    there = ours(backbone, kind)
    if make is None:
        unhook(backbone, there)
        return None
    if not there:
        there = [make()]
        backbone.register_load_state_dict_pre_hook(there[0].before)
        backbone.register_load_state_dict_post_hook(there[0].after)
    return there[0]


def _other_names(backbone: nn.Module, kept: Collection[str]) -> dict[str, str]:
    """Returns the other names of the tensors that deltas keep under these names, each with that name."""
    own = dict(tensors_of(backbone)) if kept else {}
    # A weight that is merged in all modules that share it is kept under one of its names.
    names = {id(own[name]): name for name in kept if name in own}
    return {name: names[id(tensor)] for name, tensor in own.items() if id(tensor) in names and name not in kept}


def _replaced(record: Record) -> set[str]:
    """Returns the names of the weights that a delta is merged into, and of the tensors that it fully trains."""
    trained = record.backbone_values or record.trained_values
    if not (record.weights_before_merge or trained):
        return set()
    return record.weights_before_merge.keys() | (trained.keys() - record.moved - record.unsaved)


def _guards(module: nn.Module) -> list[RefuseLoading]:
    return ours(module, RefuseLoading) if module._load_state_dict_pre_hooks else []


def records_around(backbone: nn.Module) -> list[Record]:
    """Returns the records of deltas that have something in a backbone, and were attached to a module around it."""
    # A delta that only trains tensors here fully has no modules here, but guards.
    above_it = [
        record
        for guard in _guards(backbone)
        for record in guard.records
        if guard.path and any(is_below(name, guard.path) for name in _replaced(record))
    ]
    here = set(rooted_at(backbone))
    there = [record for record in records_of(backbone) if record not in here]
    # What an interrupted detach has left is not held by any module.
    return [record for record in dict.fromkeys((*above_it, *there)) if not record.leaving]
