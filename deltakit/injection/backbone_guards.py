"""Backbone guards: hooks that a backbone needs besides the deltas' own, while deltas are attached."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from deltakit.core import (
    Attachment,
    InputHook,
    OutputHook,
    Record,
    RunningCall,
    children_of,
    delta_children,
    held_in,
    join,
    parent_of,
    records_at,
    records_in,
    roots_inside,
)
from deltakit.injection.call_observer import CallObserver
from deltakit.injection.first_forward import FirstForward
from deltakit.injection.hooks import follow_hooks_when_compiled
from deltakit.injection.inactive_values import WarnOfInactive
from deltakit.injection.loading_guards import ReportPart, refuse_loading
from deltakit.injection.replaced_targets import TargetGuard
from deltakit.injection.rows_observer import forget_rows, observe_rows
from deltakit.injection.tables import ours, stand, unhook
from deltakit.injection.training_guard import TrainingGuard
from deltakit.injection.weight_patch import PatchHook

_NESTED = "_deltakit_nested"


class InputGradients:
    """Makes gradients reach the deltas of a block under reentrant checkpointing.

    Reentrant checkpointing computes no gradients if no input of the block requires them, which is the case when everything
    below is frozen. Only blocks with deltas get this hook, so that the backward pass still stops at the lowest delta.

    Each of them has it all the time, though that takes 6 us in each forward (measured, small blocks): checkpointing may be
    switched on later, and nobody else is sure to run before a block. Modules that hold blocks are often not called
    themselves, a user may call `model.forward`, and compiled code registers no hooks.
    """

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> Any:
        if not (block.training and getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled()):
            return None
        options = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
        if not options.get("use_reentrant", True):
            return None
        if not args or not isinstance(args[0], torch.Tensor) or args[0].requires_grad:
            return None
        if not torch.is_floating_point(args[0]):
            return None
        return (args[0].detach().requires_grad_(), *args[1:])


def watch(backbone: nn.Module) -> None:
    """Adds the guards that a backbone needs for its current delta modules, and removes all others."""
    follow_hooks_when_compiled()
    found = _Found(backbone, roots_inside(backbone))
    known: dict[int, bool] = {}
    _watch_inside(backbone, "", known, found)
    there, removed = set(known), []
    for guard in ours(backbone, TargetGuard):
        removed += guard.removed(there)
    # What was taken out of the backbone may be put back after the delta was detached.
    guarded = [m for m in removed if _watch_inside(m, "", known, _Found(m)) or m._load_state_dict_pre_hooks]
    holds = bool(found.records)
    stand(ReportPart, backbone, lambda guard: backbone.register_load_state_dict_pre_hook(guard), wanted=holds)
    stand(WarnOfInactive, backbone, lambda guard: backbone.register_state_dict_pre_hook(guard), wanted=holds)
    stand(CallObserver, backbone, partial(_around, backbone), wanted=found.reads_call)
    stand(TrainingGuard, backbone, partial(_ahead, backbone), wanted=holds)
    for guard in ours(backbone, TrainingGuard):
        guard.follow(found.records)
    if holds:
        stand(TargetGuard, backbone, partial(_ahead, backbone), wanted=True)
    refuse_loading(backbone, found.records, removed)
    # Also one that is not wanted any more: a forward of another thread may be about to call it.
    for guard in ours(backbone, TargetGuard):
        guard.expect(found.ways, _holdings(backbone, found, guard.holdings), there, guarded)
    stand(TargetGuard, backbone, partial(_ahead, backbone), wanted=holds)
    for first in ours(backbone, FirstForward):
        first.changing = False


def change_begins(backbone: nn.Module, change: RunningCall) -> None:
    """Notes that a delta is being attached or detached, until `watch` is called.

    A forward after an interruption raises a StateError then.

    Args:
        change: the function that attaches or detaches, and calls `watch`.
    """
    stand(TargetGuard, backbone, partial(_ahead, backbone), wanted=True)
    for guard in ours(backbone, TargetGuard):
        guard.changing = change
    for first in ours(backbone, FirstForward):
        first.change_begins()


class _Found:
    """What `_watch_inside` finds: the records of the deltas, the targets with those on each, and the ways to the targets.

    Args:
        module: where it looks.
        elsewhere: the deltas attached to a part of the backbone, which has guards of its own for them.
    """

    def __init__(self, module: nn.Module, elsewhere: Collection[Record] = ()) -> None:
        self.elsewhere = elsewhere
        there = records_in(module)
        self.leaving = {record for record in there if record.leaving}
        # Not collected target by target: hundreds of targets may each have hundreds of deltas.
        self.records = [record for record in there if record not in self.leaving and record not in elsewhere]
        self.targets: list[tuple[str, nn.Module, Mapping[Record, Any]]] = []
        self.ways: list[tuple[nn.Module, str]] = []
        self.reads_call = False


def _holdings(backbone: nn.Module, found: _Found, known: Collection[Record]) -> dict[Record, dict[str, nn.Module]]:
    """Returns the modules that each delta changes or fully trains, by path. Adds the ways to the latter.

    Args:
        known: the deltas whose targets are known already. There may be hundreds, and only one was attached.
    """
    holdings: dict[Record, dict[str, nn.Module]] = {record: {} for record in found.records}
    new = [record for record in found.records if record not in known]
    for path, module, records in found.targets if new else ():
        for record in new:
            if record in records:
                holdings[record][path] = module
    for record, held in holdings.items():
        if not (record.backbone_values or record.trained_values):
            # As nearly all of hundreds: they train nothing fully.
            continue
        for owner in dict.fromkeys(map(parent_of, record.fully_trained)):
            holder: nn.Module | None = backbone
            for name in owner.split(".") if owner else ():
                if holder is not None:
                    found.ways.append((holder, name))
                    holder = holder._modules.get(name)
            if holder is not None:
                held[owner] = holder
    return holdings


def _watch_inside(module: nn.Module, path: str, known: dict[int, bool], all_found: _Found) -> bool:
    """Sets the guards of a module and the modules in it, and returns whether there are delta modules in it.

    Args:
        known: the results for modules that were visited before, by id.
    """
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = found = False
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    own, deltas = children_of(module) if module._modules else ([], {})
    if deltas:
        found = _watch_target(module, path, all_found)
    elif hooked:
        _remove_copies(module)
    for name, child in own:
        if not (child._modules or child._forward_hooks or child._forward_pre_hooks):
            # Most modules have no modules and no hooks: without a call for each of them.
            known[id(child)] = False
        elif _watch_inside(child, join(path, name), known, all_found):
            all_found.ways.append((module, name))
            found = True
    known[id(module)] = found
    if hooked and not found:
        forget_rows(module)
    if hasattr(type(module), "gradient_checkpointing"):
        stand(InputGradients, module, partial(_ahead, module), wanted=found)
    if isinstance(module, nn.TransformerEncoder):
        _keep_unnested(module, wanted=found)
    return found


def _watch_target(module: nn.Module, path: str, all_found: _Found) -> bool:
    """Notes the deltas on a module, and returns whether there are any."""
    records = records_at(module)
    if not records:
        _remove_copies(module)
        return False
    records = _without(records, all_found.leaving)
    found = bool(records)
    records = _without(records, all_found.elsewhere)
    if records:
        all_found.targets.append((path, module, records))
        all_found.reads_call |= _reads_call(module)
    return found


def _without(records: Mapping[Record, Any], others: Collection[Record]) -> Mapping[Record, Any]:
    # There may be hundreds of records, and nearly always none or one of the others.
    there = {record for record in others if record in records} if others else ()
    return {record: None for record in records if record not in there} if there else records


def _remove_copies(module: nn.Module) -> None:
    """Removes hooks of delta modules from a module that has none: torch's quantizers copy hooks to the layers they make."""
    found = ours(module, (InputHook, OutputHook, PatchHook))
    unhook(module, [hook for hook in found if not isinstance(hook, PatchHook) or _is_copy(module, hook)])


def _is_copy(module: nn.Module, hook: PatchHook) -> bool:
    return hook.holder_in(module) is module and hook.delta(module) is None


def _reads_call(target: nn.Module) -> bool:
    # By class first, because a target may have hundreds of delta modules.
    held = held_in(target._modules)
    kinds: Any = held.kinds if held is not None else set(map(type, delta_children(target).values()))
    if not any(kind.reads_call for kind in kinds):
        return False
    deltas: Any = delta_children(target).values()
    return any(delta.reads_call and delta.record is not None and not delta.record.leaving for delta in deltas)


def watch_rows(backbone: nn.Module, attached: Sequence[Attachment]) -> None:
    """Adds the hooks that note rows on graphs, when a backbone is first used with `rows`. `watch` removes them on detach.

    Backbones that are never used with `rows` do not pay for these hooks.
    """
    records = [attachment.record for attachment in attached]
    # `watch` looks for hooks in the module that a delta was attached to, and in those inside. This may be a part of the
    # backbone that `rows` was given, or the other way round.
    roots = [module for module in backbone.modules() if module._load_state_dict_pre_hooks and ours(module, ReportPart)]
    # Nearly always it is the backbone itself, and this runs for each block.
    inside = {id(module) for root in roots for module in root.modules()} if roots != [backbone] else set()
    if roots != [backbone] and any(
        id(site.target) not in inside for attachment in attached for site in attachment.sites
    ):
        roots.append(backbone)
    for root in roots:
        observe_rows(root, records)


def _ahead(module: nn.Module, guard: Any) -> None:
    module.register_forward_pre_hook(guard)


def _around(module: nn.Module, guard: Any) -> None:
    module.register_forward_pre_hook(guard.begin, with_kwargs=True)
    module.register_forward_hook(guard.end, always_call=True)


def _keep_unnested(encoder: nn.TransformerEncoder, *, wanted: bool) -> None:
    """Stops torch's encoder from making nested tensors of padded batches while it has delta modules.

    In evaluation it makes them for its fused layers (`nn.TransformerEncoder.forward`). A layer with a delta is not fused and
    does not accept them.
    """
    # The note is there before and after the change, so that an interruption between the two loses nothing.
    if wanted and getattr(encoder, "use_nested_tensor", False):
        encoder.__dict__[_NESTED] = True
        encoder.use_nested_tensor = False
    elif not wanted and encoder.__dict__.get(_NESTED, False):
        encoder.use_nested_tensor = True
        del encoder.__dict__[_NESTED]
