"""Adds a delta module and its hooks to its target, and removes them again."""

import sys
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from deltakit.core import DeltaModule, delta_children, module_at
from deltakit.injection.context_hooks import ContextInputHook, ContextOutputHook, calls_of, clean_up
from deltakit.injection.output_hooks import InputHook, OutputHook
from deltakit.injection.tables import ours, unhook
from deltakit.injection.weight_patch import PatchHook, UnpatchHook, hide_sums_of

_ORDER, _WEIGHT_READ = attrgetter("record.order"), attrgetter("weight_read")


def put(backbone: nn.Module, target: nn.Module, key: str, delta: DeltaModule) -> list[nn.Module]:
    """Registers a delta module as a child of its target, and the hooks that its kind and its target need.

    Returns:
        The modules whose hooks patch the weight; none of them if the hooks are on the target. Their hooks need
        `sort_patches` when all delta modules are there.
    """
    if delta.training is not target.training:
        delta.train(target.training)
    target.add_module(key, delta)
    read = delta.weight_read
    if read is None:
        _hook_target(target)
        return []
    scopes = [backbone.get_submodule(path) for path in (read.scope, *(other.scope for other in read.also))]
    _hook_weight(scopes[0], key, read.holder)
    for scope, other in zip(scopes[1:], read.also, strict=True):
        source = None if other.owner == read.owner else delta
        _hook_weight(scope, key, other.holder, source, other.name)
    return scopes


def take_patches(scope: nn.Module, keys: Collection[str], deltas: Collection[DeltaModule]) -> None:
    """Removes the hooks by which a module applies the weight patches of some delta modules of one delta.

    All at once, because a module may have thousands of such hooks. It can be repeated after an interruption.

    Args:
        keys: the names of the delta modules in their targets.
    """
    # The user may have removed the module that a hook belongs to.
    hooks = [
        hook
        for hook in ours(scope, PatchHook)
        if hook.key in keys and ((delta := hook.delta(scope)) is None or delta in deltas)
    ]
    for holder, key in {(hook.holder_in(scope), hook.key) for hook in hooks}:
        if holder is not None:
            hide_sums_of(holder, key)
    unhook(scope, hooks)


def take(target: nn.Module, key: str, delta: DeltaModule) -> None:
    """Removes a delta module and its hooks from its target. It can be repeated, and works on what is there only in part.

    The delta module itself is removed last: as long as it is there, an interrupted removal is found and made again.
    """
    there = target._modules.get(key) is delta
    if delta.weight_read is None:
        _hook_target(target, without=key if there else "")
    if there:
        del target._modules[key]


def scopes_of(backbone: nn.Module, delta: DeltaModule) -> list[nn.Module]:
    """Returns the modules whose hooks patch the weight of a delta module that is attached, as far as they are there."""
    read = delta.weight_read
    paths = [read.scope, *(other.scope for other in read.also)] if read is not None else []
    found = [module_at(backbone, path) for path in dict.fromkeys(paths)]
    return [module for module in found if module is not None]


def _hook_target(target: nn.Module, without: str = "") -> None:
    """Registers the hooks of all delta modules on a target again, in the order in which the deltas were first attached.

    They come before all other hooks. transformers installs its hooks that capture hidden states in the first call that
    needs them, and a delta attached later would be missing from the captured states.

    Args:
        without: the name of a delta module that is about to be removed.
    """
    calls = calls_of(target)
    clean_up(target, calls)
    unhook(target, ours(target, (InputHook, OutputHook)))
    # In C code and by class, because a target may have hundreds of delta modules, and each attach and detach asks for all.
    held = dict(delta_children(target))
    held.pop(without, None)
    if any(map(_WEIGHT_READ, held.values())):
        held = {key: child for key, child in held.items() if child.weight_read is None}
    keys = sorted(held, key=dict(zip(held, map(_ORDER, held.values()), strict=True)).__getitem__)
    kinds: set[type[DeltaModule]] = set(map(type, held.values()))
    before = {kind for kind in kinds if kind.acts_before()}
    behind = {kind for kind in kinds if kind.acts_after()}
    keys_before = tuple(key for key in keys if type(held[key]) in before) if before else ()
    keys_after = tuple(keys if behind == kinds else (key for key in keys if type(held[key]) in behind))
    always = any(kind.cleans_up() for kind in kinds)
    if keys_before:
        ahead = ContextInputHook(keys_before, calls) if always else InputHook(keys_before)
        target.register_forward_pre_hook(ahead, prepend=True, with_kwargs=True)
    if keys_after:
        after = ContextOutputHook(keys_after, calls) if always else OutputHook(keys_after)
        target.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=always)


def _order(delta: DeltaModule | None) -> int:
    return delta.record.order if delta is not None and delta.record is not None else 0


def _hook_weight(scope: nn.Module, key: str, holder: str, source: DeltaModule | None = None, name: str = "") -> None:
    """Registers the hooks that patch a weight around the forward that reads it."""
    scope.register_forward_pre_hook(PatchHook(key, holder, source, name), with_kwargs=True)
    scope.register_forward_hook(UnpatchHook(key, holder, source, name), with_kwargs=True, always_call=True)


def sort_patches(scope: nn.Module) -> None:
    """Sorts the patch hooks of a module by delta, ahead of all other hooks.

    Floating-point sums depend on the order, so the order must not depend on who was attached last. The hooks are moved and
    not registered again: an interruption could lose those of other deltas.
    """
    tables: tuple[Any, ...] = (scope._forward_pre_hooks, scope._forward_hooks)
    for table in tables:
        orders = {number: _order(hook.delta(scope)) for number, hook in table.items() if isinstance(hook, PatchHook)}
        for number in sorted(orders, key=lambda number: orders[number])[::-1]:
            table.move_to_end(number, last=False)


def follow_hooks_when_compiled() -> None:
    """Makes compiled models notice that hooks were added or removed.

    By default torch does not guard on hooks: a compiled model silently ignores a delta that is attached afterwards
    (pytorch#117758; measured on torch 2.13). This switches the guards on, once, and drops code compiled without them.
    """
    if "torch._dynamo" not in sys.modules:
        return
    config = sys.modules["torch._dynamo"].config
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
