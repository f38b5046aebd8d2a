"""The only file that registers hooks: it puts a delta module at its target and takes it away again."""

import sys

import torch
from torch import nn

from deltakit.core import DeltaModule
from deltakit.injection.output_hooks import Ahead, Behind, ours
from deltakit.injection.weight_patch import Replace, Restore


def put(backbone: nn.Module, target: nn.Module, key: str, delta: DeltaModule) -> None:
    """Registers a delta module as a child of its target, with the hooks that its class and its place ask for."""
    if delta.training is not target.training:
        delta.train(target.training)
    target.add_module(key, delta)
    if delta.weight_read is None:
        _stand_on(target)
        return
    _replace(backbone.get_submodule(delta.weight_read.scope), key, delta.weight_read.holder)
    for other in delta.weight_read.also:
        source = None if other.owner == delta.weight_read.owner else delta
        _replace(backbone.get_submodule(other.scope), key, other.holder, source, other.name)


def take(backbone: nn.Module, target: nn.Module, key: str) -> None:
    """Takes a delta module and its hooks away from its target."""
    delta = target._modules[key]
    reading = delta.weight_read if isinstance(delta, DeltaModule) else None
    scopes = [reading.scope, *(other.scope for other in reading.also)] if reading is not None else []
    for scope in map(backbone.get_submodule, dict.fromkeys(scopes)):
        for hook in ours(scope, Replace):
            if hook.delta(scope) is delta:
                hook.handle.remove()
    del target._modules[key]
    if reading is None:
        _stand_on(target)


def _stand_on(target: nn.Module) -> None:
    """Registers the hooks of all delta modules on a target anew: they apply in the order of their first attachment.

    Ahead of everybody else's, because transformers installs the hooks that capture hidden states lazily, at the first call
    that asks for them: a delta attached later would be missing from what they capture.
    """
    for hook in ours(target, Ahead):
        hook.handle.remove()
    there = [(key, child) for key, child in target._modules.items() if isinstance(child, DeltaModule)]
    held = sorted(((key, child) for key, child in there if child.weight_read is None), key=lambda item: _order(item[1]))
    ahead = tuple(key for key, child in held if type(child).before is not DeltaModule.before)
    behind = tuple(key for key, child in held if _acts_behind(type(child)))
    if ahead:
        before = Ahead(ahead)
        before.handle = target.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    if behind:
        always = any(child.always_after for _, child in held)
        after = Behind(behind, always=always)
        after.handle = target.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=always)


def _order(delta: DeltaModule) -> int:
    return delta.record.order if delta.record is not None else 0


def _acts_behind(kind: type[DeltaModule]) -> bool:
    return kind.after is not DeltaModule.after or kind.forward is not DeltaModule.forward


def _replace(scope: nn.Module, key: str, holder: str, source: DeltaModule | None = None, name: str = "") -> None:
    """Registers what puts a weight with its update in the place of a weight; updates add up in one order always."""
    hooks = [*ours(scope, Replace), Replace(key, holder, source, name), Restore(key, holder, source, name)]
    for hook in hooks:
        if hook.handle is not None:
            hook.handle.remove()
    ordered = sorted(hooks, key=lambda hook: _order(hook.delta(scope)))
    for hook in ordered[::-1]:
        if isinstance(hook, Restore):
            hook.handle = scope.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=True)
        else:
            hook.handle = scope.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def follow_hooks_when_compiled() -> None:
    """Makes compiled models notice that hooks came or went.

    By default torch does not guard on hooks: a compiled model silently ignores a delta that is attached afterwards
    (pytorch#117758; measured on torch 2.13). Guards are switched on, once, and what was compiled without them goes.
    """
    if "torch._dynamo" not in sys.modules:
        return
    config = sys.modules["torch._dynamo"].config
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
