"""Adds a delta module and its hooks to its target, and removes them again."""

import sys

import torch
from torch import nn

from deltakit.core import DeltaModule
from deltakit.injection.output_hooks import InputHook, OutputHook, ours
from deltakit.injection.weight_patch import PatchHook, UnpatchHook


def put(backbone: nn.Module, target: nn.Module, key: str, delta: DeltaModule) -> None:
    """Registers a delta module as a child of its target, and the hooks that its kind and its target need."""
    if delta.training is not target.training:
        delta.train(target.training)
    target.add_module(key, delta)
    if delta.weight_read is None:
        _hook_target(target)
        return
    _hook_weight(backbone.get_submodule(delta.weight_read.scope), key, delta.weight_read.holder)
    for other in delta.weight_read.also:
        source = None if other.owner == delta.weight_read.owner else delta
        _hook_weight(backbone.get_submodule(other.scope), key, other.holder, source, other.name)


def take(backbone: nn.Module, target: nn.Module, key: str) -> None:
    """Removes a delta module and its hooks from its target."""
    delta = target._modules[key]
    read = delta.weight_read if isinstance(delta, DeltaModule) else None
    scopes = [read.scope, *(other.scope for other in read.also)] if read is not None else []
    for scope in map(backbone.get_submodule, dict.fromkeys(scopes)):
        for hook in ours(scope, PatchHook):
            if hook.delta(scope) is delta:
                hook.handle.remove()
    del target._modules[key]
    if read is None:
        _hook_target(target)


def _hook_target(target: nn.Module) -> None:
    """Registers the hooks of all delta modules on a target again, in the order in which the deltas were first attached.

    They come before all other hooks. transformers installs its hooks that capture hidden states in the first call that
    needs them, and a delta attached later would be missing from the captured states.
    """
    for hook in (*ours(target, InputHook), *ours(target, OutputHook)):
        hook.handle.remove()
    held = [
        (key, child)
        for key, child in target._modules.items()
        if isinstance(child, DeltaModule) and child.weight_read is None
    ]
    held.sort(key=lambda item: _order(item[1]))
    keys_before = tuple(key for key, child in held if child.acts_before())
    keys_after = tuple(key for key, child in held if child.acts_after())
    if keys_before:
        before = InputHook(keys_before)
        before.handle = target.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    if keys_after:
        always = any(child.cleans_up() for _, child in held)
        after = OutputHook(keys_after, always=always)
        after.handle = target.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=always)


def _order(delta: DeltaModule) -> int:
    return delta.record.order if delta.record is not None else 0


def _hook_weight(scope: nn.Module, key: str, holder: str, source: DeltaModule | None = None, name: str = "") -> None:
    """Registers the hooks that patch a weight around the forward that reads it.

    All patch hooks of the scope are registered again, sorted by delta. Floating-point sums depend on the order, so the
    order must not depend on who was attached last.
    """
    hooks = [*ours(scope, PatchHook), PatchHook(key, holder, source, name), UnpatchHook(key, holder, source, name)]
    for hook in hooks:
        if hook.handle is not None:
            hook.handle.remove()
    ordered = sorted(hooks, key=lambda hook: _order(hook.delta(scope)))
    for hook in ordered[::-1]:
        if isinstance(hook, UnpatchHook):
            hook.handle = scope.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=True)
        else:
            hook.handle = scope.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


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
