"""Notices in a forward that modules with deltas were replaced or removed, or that others were added beside them.

The hooks of a delta go with a module that the user replaces (`model.classifier = nn.Linear(...)`), and the forward would
silently run without that part. Libraries may also add a module that is called instead (diffusers' `fuse_qkv_projections`).
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn

from deltakit.core import Record, RootHook, RunningCall, attachments_of, complete_replica, parent_of
from deltakit.errors import StateError, warn
from deltakit.injection.first_forward import FirstForward, watch_first_forward
from deltakit.injection.lock import Lock
from deltakit.injection.tables import ids_of_modules, ours

_LOCK = Lock()


class TargetGuard(RootHook):
    """Compares the modules on the way to the targets with those that were there when a delta was last attached or detached.

    This runs in each forward of the backbone, so it compares by identity in three calls of C code.
    """

    def __init__(self) -> None:
        self.changing: RunningCall | None = None
        """The attaching or detaching that is going on, or that was interrupted."""
        self.holdings: dict[Record, dict[str, nn.Module]] = {}
        """The modules that each delta changes or fully trains, by path."""
        self.reported: set[tuple[Record, str]] = set()
        """Those that are no longer in the backbone, as far as the user was told."""
        self.guarded: list[nn.Module] = []
        """The modules that may have guards of their own, also those that are no longer in the backbone."""
        self.ids: dict[Record, frozenset[int]] = {}
        """The ids of the modules in `holdings`, so that those of hundreds of deltas are compared in C code."""
        self._remember(())

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other modules.
        return {**self.__dict__, "ids": {}}

    def _absent(self, there: Set[int]) -> list[tuple[Record, dict[str, nn.Module]]]:
        """Returns the deltas that have modules that are not there, with all their modules."""
        # Hundreds of deltas may have the same modules: their ids are one set, which is compared once.
        same = {ids: ids for ids in self.ids.values()}
        compared: dict[frozenset[int], bool] = {}
        found = []
        for record, held in self.holdings.items():
            ids = self.ids.get(record)
            if ids is None:
                ids = frozenset(map(id, held.values()))
                ids = self.ids[record] = same.setdefault(ids, ids)
            if ids not in compared:
                compared[ids] = there >= ids
            if not compared[ids]:
                found.append((record, held))
        return found

    def removed(self, there: Set[int]) -> list[nn.Module]:
        """Returns the modules that may have guards and are no longer in the backbone.

        Args:
            there: the ids of all modules in the backbone.
        """
        modules = [*self.guarded, *(module for _, held in self._absent(there) for module in held.values())]
        return [module for module in dict.fromkeys(modules) if id(module) not in there]

    def expect(
        self,
        ways: Iterable[tuple[nn.Module, str]],
        holdings: Mapping[Record, dict[str, nn.Module]],
        there: Set[int],
        removed: Iterable[nn.Module],
    ) -> None:
        """Sets the modules that must be there from now on.

        Args:
            ways: each module on the way to a target, and the name of its child on that way.
            holdings: the modules of each delta by path; of a delta that is known already, only those that may be new.
            there: the ids of all modules in the backbone.
            removed: modules that were taken out of it, and still have guards.
        """
        ways = list(ways)
        self.guarded = list(dict.fromkeys((*(parent for parent, _ in ways), *removed)))
        # While its delta is attached, a module that was replaced is not forgotten, nor the new one taken for it.
        known = {record: self.holdings.get(record, {}) for record in holdings}
        new = {record for record, held in holdings.items() if held and held.keys() - known[record].keys()}
        self.ids = {record: ids for record, ids in self.ids.items() if record in holdings and record not in new}
        self.holdings = {
            record: {**held, **known[record]} if record in new else known[record] for record, held in holdings.items()
        }
        self.reported = {(record, path) for record, path in self.reported if path in self.holdings.get(record, {})}
        # If one is gone, the next forward looks and tells.
        self._remember(ways, look=bool(self._gone(there)))
        self.changing = None

    def _remember(self, ways: Iterable[tuple[nn.Module, str]], *, look: bool = False) -> None:
        self.ways = list(ways)
        tables = [parent._modules for parent, _ in self.ways]
        names = [name for _, name in self.ways]
        # In one assignment: forwards of other threads read it.
        self.seen = (tables, names, list(map(dict.get, tables, names)), [-1] if look else list(map(len, tables)))

    def _gone(self, there: Set[int]) -> list[tuple[Record, str]]:
        return [
            (record, path)
            for record, held in self._absent(there)
            for path, module in held.items()
            if id(module) not in there and (record, path) not in self.reported
        ]

    def __call__(self, backbone: nn.Module, args: Any) -> None:
        """Compares the modules.

        Raises:
            StateError: if attaching or detaching a delta was interrupted, and the delta is there in part.
        """
        # As the first of our hooks: the others look for the delta modules' parameters.
        complete_replica(backbone)
        # Dynamo guards the modules of a compiled forward itself, and compiles it again if they are replaced.
        if torch.compiler.is_compiling():
            return
        seen = tables, names, modules, sizes = self.seen
        if self.changing is None and list(map(dict.get, tables, names)) == modules and list(map(len, tables)) == sizes:
            return
        # One thread at a time, because two that look would each restart the check that the other began.
        with _LOCK:
            self._look(backbone, seen)

    def _look(self, backbone: nn.Module, seen: tuple[Any, ...]) -> None:
        change = self.changing
        if change is not None:
            # Another thread attaches or detaches a delta, and will say then what is to be expected. A change that ends in this
            # moment has said so already.
            if not change.over or self.changing is not change:
                return
            raise StateError(
                "attaching or detaching a delta was interrupted, so that only a part of it is here; remove that by "
                "detach(): deltakit.deltas(model) has its handle"
            )
        there = ids_of_modules(backbone) if self.seen is seen else None
        if there is None:
            # Another thread has attached or detached a delta, or has looked, since this one compared.
            return
        gone = self._gone(there)
        if gone:
            warn(_replaced(gone))
        self.reported.update(gone)
        # The targets that are still there may not be called any more.
        own = [attachment for attachment in attachments_of(backbone) if attachment.backbone is backbone]
        for attachment in own:
            attachment.record.checked = False
            watch_first_forward(attachment, again=True)
        for first in ours(backbone, FirstForward):
            first.begin(backbone, args=None)
        self._remember(
            [(parent, name) for parent, name in self.ways if id(parent) in there and name in parent._modules]
        )


def _replaced(gone: list[tuple[Record, str]]) -> str:
    record, path = gone[0]
    return (
        f"delta {record.name!r}: {path} is no longer in the backbone ({len(gone)} such modules): it was replaced or removed "
        "after the delta was attached, and the delta does nothing there; put it back, or detach() the delta and attach a new "
        "one to the changed backbone"
    )


def modules_of(backbone: nn.Module, record: Record) -> dict[str, nn.Module]:
    """Returns the modules that an attached delta changes or fully trains, by path, also those that the user replaced since.

    It is empty while the delta is being attached.
    """
    guards: list[TargetGuard] = ours(backbone, TargetGuard)
    return {path: module for guard in guards for path, module in guard.holdings.get(record, {}).items()}


def holder_of(backbone: nn.Module, record: Record, name: str) -> nn.Module:
    """Returns the module that has a tensor which an attached delta changes or fully trains, also if the user replaced it."""
    path = parent_of(name)
    return modules_of(backbone, record).get(path) or backbone.get_submodule(path)
