"""The check that the first forward of a backbone calls every target."""

from collections.abc import Collection
from functools import cache
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn

from deltakit.core import Attachment, DeltaModule, InputHook, OutputHook, Record, keyed, own_modules, parent_of
from deltakit.errors import StateError, TargetError, warn
from deltakit.injection.hooks import scopes_of
from deltakit.injection.ran_modules import Ran, caller_of, release
from deltakit.injection.tables import ids_of_modules, ours, unhook
from deltakit.injection.weight_patch import PatchHook, UnpatchHook


class Watched(NamedTuple):
    """A module whose hooks call a delta module or apply its weight patch, and what notes that the module around it ran.

    `around` is None where that is the backbone itself.
    """

    path: str
    module: nn.Module
    key: str
    delta: DeltaModule
    around: Ran | None


Hooks = dict[tuple[nn.Module, DeltaModule], list[Any]]


class FirstForward:
    """Raises an error if the first forward of the backbone never called a target. There is one for all deltas.

    Some modules are never called, because another one uses their weight directly (a fused kernel takes `proj.weight`). A
    hook there never runs, so the delta would silently do nothing. It is an error if the surrounding module was called, and
    a warning if it was not (an expert that no token was routed to, a vision tower in a batch of text).

    A delta that compiled code calls is not checked.

    Nothing is registered during forwards, which may run in several threads and may be interrupted.
    """

    def __init__(self) -> None:
        self.watched: dict[Record, list[Watched]] = {}
        self.deltas: dict[Record, list[tuple[str, DeltaModule]]] = {}
        self.around: dict[nn.Module, Ran] = {}
        self.again: set[Record] = set()
        """Those that are checked again, because the backbone was changed."""
        self.checking: dict[int, tuple[list[Record], object]] = {}
        """The records that the forward of each thread checks, and the `change` before it. One that was interrupted is
        replaced by the thread's next."""
        self.changing = False
        """Whether a delta is being attached or detached."""
        self.change = object()
        """Stands for the last time that a delta was attached or detached. That replaces hooks, so forwards around it do not
        tell who ran. It is not a number: of two threads that count, one may undo what the other counted."""

    def change_begins(self) -> None:
        """Ends the checks of all forwards that are running. The next ones check again."""
        self.changing = True
        self.change = object()

    def begin(self, backbone: nn.Module, args: Any) -> None:
        """Starts watching the modules around the targets.

        Raises:
            StateError: if the backbone is trained and a delta was offloaded with it.
        """
        if torch.compiler.is_compiling():
            return
        change = self.change
        records = [record for record in list(self.watched) if record.live and not self.changing]
        for record in records:
            self._refuse_offloaded(backbone, record)
        thread = get_ident()
        # Not while the forward of another thread is being checked, which still needs what was noted.
        if not {*self.checking} - {thread}:
            for record in records:
                record.compiled = False
        for ran in list(self.around.values()):
            ran.threads.discard(thread)
        self.checking[thread] = (records, change)

    def end(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Checks the targets after a forward, unless it was compiled.

        Raises:
            TargetError: if a target was never called, but the module around it was.
        """
        if torch.compiler.is_compiling():
            return
        thread = get_ident()
        records, change = self.checking.get(thread, ([], None))
        # Read while the entry is there: without it, `begin` in another thread may reset them. What compiled code calls is not
        # known one by one (`core.target_hooks`).
        compiled = {record for record in records if record.compiled}
        self.checking.pop(thread, None)
        # What the user removed since is reported elsewhere (`replaced_targets`).
        there = (ids_of_modules(backbone) if records else None) or set()
        watched = {
            record: [one for one in self.watched.get(record, ()) if id(one.module) in there and record not in compiled]
            for record in records
            if there
        }
        # Once for all deltas: there may be hundreds on the same modules.
        hooks = _hooks([one for of_record in watched.values() for one in of_record])
        for record, of_record in watched.items():
            self._check(backbone, record, of_record, hooks, change)

    def _check(self, backbone: nn.Module, record: Record, watched: list[Watched], hooks: Hooks, change: object) -> None:
        # One delta may have several hooks (a tied weight is read in several modules). It is enough if one of them ran.
        ran = {id(one.delta) for one in watched if any(hook.fired for hook in hooks.get((one.module, one.delta), ()))}
        silent = [one for one in watched if id(one.delta) not in ran]
        skipped = [one for one in silent if one.around is None or get_ident() in one.around.threads]
        if self.change is not change or record not in self.watched:
            # Meanwhile another thread attached or detached a delta, or has checked this one.
            return
        if skipped:
            raise TargetError(_never_called(record, len(skipped), skipped[0]))
        again = record in self.again
        # With an offloaded delta the check goes on in later forwards, because it must also run before the first training.
        if not any(_offloaded(module) for _, module in self.deltas.get(record, ())):
            # Inside gradient checkpointing, compiled code may set an attribute only to what it is already.
            record.checked = record.compiled = True
            self.drop(backbone, record)
        if silent and not again:
            warn(
                f"delta {record.name!r}: {len(silent)} of its targets were not called in the first forward, such as "
                f"{silent[0].path}, and neither was the module around it: the delta did nothing there so far; if these "
                "modules are not used by your data, leave them out with exclude=",
            )

    def add(self, attachment: Attachment, *, again: bool) -> None:
        """Watches the targets of a delta."""
        backbone, record = attachment.backbone, attachment.record
        # Not watched until the end: other threads check nothing while the hooks forget that they ran.
        self.watched.pop(record, None)
        record.compiled = False
        (self.again.add if again else self.again.discard)(record)
        paths = {id(module): path for path, module in own_modules(backbone)}
        self.deltas[record] = [(site.owner, site.module) for site in attachment.sites]
        # Once for all targets in one module.
        around = cache(lambda parent: self._around(attachment, parent))
        watched = [
            Watched(paths[id(module)], module, key, site.module, around(parent_of(paths[id(module)])))
            for site, key in keyed(record, attachment.sites)
            if site.module.must_be_called
            for module in ([site.target] if site.module.weight_read is None else scopes_of(backbone, site.module))
            if id(module) in paths
        ]
        if again:
            for hook in [hook for hooks in _hooks(watched).values() for hook in hooks]:
                hook.fired = False
            # Forwards that are running now do not tell who ran before.
            self.change = object()
        self.watched[record] = watched

    def _around(self, attachment: Attachment, path: str) -> Ran | None:
        """Returns what notes that the module ran that calls those at a path; None for the backbone."""
        # If the surrounding module did not run either, the target had no chance to be called. Its hook tells the two cases
        # apart. The backbone itself is running whenever it is asked.
        parent = caller_of(attachment.backbone, path)
        if parent is attachment.backbone:
            return None
        if parent not in self.around:
            self.around[parent] = Ran()
            parent.register_forward_pre_hook(self.around[parent])
        ran = self.around[parent]
        if attachment.record not in ran.records:
            ran.records.append(attachment.record)
        return ran

    def drop(self, backbone: nn.Module, record: Record) -> None:
        """Stops watching the targets of a delta."""
        self.watched.pop(record, None)
        self.deltas.pop(record, None)
        self.again.discard(record)
        for parent, ran in list(self.around.items()):
            if release(parent, ran, record):
                self.around.pop(parent, None)
        if not self.watched:
            unhook(backbone, [self])

    def _refuse_offloaded(self, backbone: nn.Module, record: Record) -> None:
        """Raises StateError if the backbone is in training and the delta was offloaded with it."""
        # accelerate copies offloaded parameters to the device for each forward. The copies get the gradients, and are
        # thrown away with them: training would run and change nothing.
        if not (backbone.training and torch.is_grad_enabled()):
            return
        for path, module in self.deltas.get(record, ()):
            if _offloaded(module):
                raise StateError(
                    f"{path}: delta {record.name!r} was offloaded with its backbone and would not be trained, because "
                    "offloaded parameters get no gradients; offload the backbone first and attach the delta afterwards"
                )


def _hooks(watched: Collection[Watched]) -> Hooks:
    """Returns the hooks that call a delta module or apply its weight patch, by the hooked module and the delta module."""
    # Looked up each time: another delta at the target replaces its hooks. In one pass over the hooks of a module, because one
    # module may apply thousands of weight patches.
    found: Hooks = {}
    for module in dict.fromkeys(one.module for one in watched):
        for hook in ours(module, PatchHook):
            delta = hook.delta(module)
            if delta is not None and not isinstance(hook, UnpatchHook):
                found.setdefault((module, delta), []).append(hook)
    for one in watched:
        for hook in ours(one.module, (InputHook, OutputHook)) if one.delta.weight_read is None else ():
            if one.key in hook.delta_keys:
                found.setdefault((one.module, one.delta), []).append(hook)
    return found


def _never_called(record: Record, count: int, one: Watched) -> str:
    more = f" ({count} such targets)" if count > 1 else ""
    head = (
        f"{one.path}: delta {record.name!r} did nothing here{more}: in the first forward this "
        f"{type(one.module).__name__} was never called though the module around it ran, which probably uses the weight "
        "directly; detach the delta, and attach it again with "
    )
    if one.delta.has_weight_form and one.delta.weight_read is None:
        return head + f"at='{one.path}.weight' (a weight patch) or without this module (exclude=)"
    return head + f"exclude= for this module, because {one.delta.word()} has no weight patch"


def _offloaded(delta: DeltaModule) -> bool:
    """Returns whether accelerate offloaded trained parameters of a delta module, and copies them in for each call."""
    return any(
        hasattr(module, "_hf_hook") and parameter.is_meta and parameter.requires_grad
        for module in delta.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def watch_first_forward(attachment: Attachment, *, again: bool = False) -> None:
    """Checks the targets of a delta in the next forward of its backbone, unless they were checked before.

    Args:
        again: whether they were checked before the backbone was changed. Then only errors are reported.
    """
    backbone = attachment.backbone
    if not attachment.record.checked:
        standing = ours(backbone, FirstForward)
        first = standing[0] if standing else FirstForward()
        first.add(attachment, again=again)
        # Asked again: another thread may have ended the last other check meanwhile.
        if not ours(backbone, FirstForward):
            backbone.register_forward_pre_hook(first.begin)
            backbone.register_forward_hook(first.end)


def forget_first_forward(attachment: Attachment) -> None:
    """Removes what `watch_first_forward` left on the backbone."""
    backbone, record = attachment.backbone, attachment.record
    for first in ours(backbone, FirstForward):
        first.drop(backbone, record)
    # Also in a copy of a layer, which has the hooks on the modules but not the check on the backbone.
    for _, module in own_modules(backbone):
        for ran in ours(module, Ran) if module._forward_pre_hooks else ():
            release(module, ran, record)
