"""Adds a delta module and its hooks to its target, and removes them again."""

import sys
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from deltakit.core import (
    DeltaModule,
    InputHook,
    OutputHook,
    add_held,
    delta_children,
    held_in,
    module_at,
    remove_held,
)
from deltakit.injection.context_hooks import ContextInputHook, ContextOutputHook, clean_up
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
    add_held(target, key, delta)
    read = delta.weight_read
    if read is None:
        _hook_target(target, added=key)
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
        _hook_target(target, removed=key if there else "")
    if there:
        remove_held(target, key)


def scopes_of(backbone: nn.Module, delta: DeltaModule) -> list[nn.Module]:
    """Returns the modules whose hooks patch the weight of a delta module that is attached, as far as they are there."""
    read = delta.weight_read
    paths = [read.scope, *(other.scope for other in read.also)] if read is not None else []
    found = [module_at(backbone, path) for path in dict.fromkeys(paths)]
    return [module for module in found if module is not None]


class Keys(NamedTuple):
    """The names of the delta modules that the hooks of a target call before and after it, and whether they clean up."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    always: bool


def _hook_target(target: nn.Module, *, added: str = "", removed: str = "") -> None:
    """Makes the hooks of a target call all its delta modules, in the order in which the deltas were first attached.

    They come before all other hooks. transformers installs its hooks that capture hidden states in the first call that
    needs them, and a delta attached later would be missing from the captured states.

    Args:
        added: the name of a delta module that has just been added.
        removed: the name of a delta module that is about to be removed.
    """
    hooks = ours(target, (InputHook, OutputHook))
    calls = next((hook.calls for hook in hooks if isinstance(hook, ContextInputHook)), [])
    clean_up(target, calls)
    keys = _changed_keys(target, hooks, added, removed) or _all_keys(target, without=removed)
    if _renamed(target, hooks, keys):
        return
    unhook(target, hooks)
    if keys.before:
        ahead = ContextInputHook(keys.before, calls) if keys.always else InputHook(keys.before)
        target.register_forward_pre_hook(ahead, prepend=True, with_kwargs=True)
    if keys.after:
        after = ContextOutputHook(keys.after, calls) if keys.always else _output_hook(target, keys)(keys.after)
        target.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=keys.always)


def _output_hook(target: nn.Module, keys: Keys) -> type[OutputHook]:
    """Returns the class of hook that the first delta module wants. Each class calls all kinds."""
    first: Any = target._modules.get(keys.after[0]) if keys.after else None
    return OutputHook if first is None else type(first).output_hook


def _renamed(target: nn.Module, hooks: Sequence[Any], keys: Keys) -> bool:
    """Gives the hooks that are there other keys, and returns whether these are all hooks that the target needs.

    Registering them again took half of the time to detach one of hundreds of deltas. They are registered again only if one
    comes or goes, another hook stands before ours, they are context hooks, or an interruption left one hook of two or one that
    was registered in part. Tables that share a hook object must be those of one target, as a replica's and its target's are.
    """
    if not hooks or not (keys.before or keys.after):
        # Nearly always: the first delta module of a target comes, or the only one goes.
        return False
    sides: tuple[tuple[Any, Any, type[Any], tuple[str, ...]], ...] = (
        (target._forward_pre_hooks, target._forward_pre_hooks_with_kwargs, InputHook, keys.before),
        (target._forward_hooks, target._forward_hooks_with_kwargs, _output_hook(target, keys), keys.after),
    )
    standing: list[tuple[Any, type[Any], tuple[str, ...]]] = []
    for table, with_kwargs, kind, names in sides:
        number, first = next(iter(table.items()), (-1, None))
        if (first in hooks and number in with_kwargs) != bool(names):
            return False
        standing += [(first, kind, names)] if names else []
    if keys.always or _clean_up(hooks) or len(standing) != len(hooks):
        return False
    for hook, kind, names in standing:
        hook.delta_keys = names
        # The same hook becomes one of another class, so that no forward of another thread finds none.
        hook.__class__ = kind
        # Behind the change: a forward of another thread that fires from here on runs with the new keys.
        hook.fired = False
    return True


def _clean_up(hooks: Sequence[Any]) -> bool:
    return any(isinstance(hook, ContextInputHook | ContextOutputHook) for hook in hooks)


def _all_keys(target: nn.Module, without: str) -> Keys:
    # In C code and by class, because a target may have hundreds of delta modules.
    held = dict(delta_children(target))
    held.pop(without, None)
    if any(map(_WEIGHT_READ, held.values())):
        held = {key: child for key, child in held.items() if child.weight_read is None}
    keys = sorted(held, key=dict(zip(held, map(_ORDER, held.values()), strict=True)).__getitem__)
    kinds: set[type[DeltaModule]] = set(map(type, held.values()))
    before = {kind for kind in kinds if kind.acts_before()}
    behind = {kind for kind in kinds if kind.acts_after()}
    return Keys(
        tuple(key for key in keys if type(held[key]) in before) if before else (),
        tuple(keys if behind == kinds else (key for key in keys if type(held[key]) in behind)),
        any(kind.cleans_up() for kind in kinds),
    )


def _changed_keys(target: nn.Module, hooks: Sequence[Any], added: str, removed: str) -> Keys | None:
    """Returns the keys of the hooks that are there with one more or one less; None if that cannot be told from them.

    Then all delta modules at the target are looked at: after an interruption, beside weight patches, or with context hooks,
    of which one less may need no cleaning up.
    """
    if bool(added) == bool(removed):
        return None
    children: Any = target._modules
    if len(children) == 1 and not (added and hooks):
        # Nearly always: the first delta module of a target, or the only one.
        if removed:
            return Keys((), (), always=False)
        kind = type(children[added])
        return Keys((added,) if kind.acts_before() else (), (added,) if kind.acts_after() else (), kind.cleans_up())
    if _clean_up(hooks):
        return None
    before = next((hook.delta_keys for hook in hooks if isinstance(hook, InputHook)), ())
    after = next((hook.delta_keys for hook in hooks if isinstance(hook, OutputHook)), ())
    there = len({*before, *after} if before and after else before or after) + bool(added)
    delta = children[added or removed]
    if type(delta).cleans_up() or there != len(children) or held_in(children) is None:
        return None
    try:
        if removed:
            return Keys(_without(children, before, removed), _without(children, after, removed), always=False)
        return Keys(
            _with(children, before, added) if type(delta).acts_before() else before,
            _with(children, after, added) if type(delta).acts_after() else after,
            always=False,
        )
    except KeyError:
        # The user has removed a delta module, and there is a weight patch in its stead.
        return None


def _without(children: Mapping[str, DeltaModule], keys: tuple[str, ...], removed: str) -> tuple[str, ...]:
    # Those of the same order are few, and those of other deltas may be hundreds.
    place = _place(children, keys, removed)
    while place and keys[place - 1] != removed:
        place -= 1
    return keys[: place - 1] + keys[place:] if place else keys


def _with(children: Mapping[str, DeltaModule], keys: tuple[str, ...], added: str) -> tuple[str, ...]:
    place = _place(children, keys, added)
    return (*keys[:place], added, *keys[place:])


def _place(children: Mapping[str, DeltaModule], keys: tuple[str, ...], key: str) -> int:
    """Returns where a key belongs by the order of the deltas: behind all others of the same order."""
    order = _ORDER(children[key])
    # Nearly always behind all.
    if not keys or _ORDER(children[keys[-1]]) <= order:
        return len(keys)
    return bisect_right(keys, order, key=lambda other: _ORDER(children[other]))


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
