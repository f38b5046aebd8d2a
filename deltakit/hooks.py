"""The only file that registers hooks: it puts a delta module at its target and takes it away again."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from deltakit.calls import Ahead, Behind, Replace, Restore
from deltakit.errors import DeltaWarning, StateError, TargetError
from deltakit.inference.walk import above, is_callable
from deltakit.method import DeltaModule
from deltakit.watchers import InputGradients, Ran, ReportPart, Unnested


def put(backbone: nn.Module, target: nn.Module, key: str, delta: DeltaModule) -> None:
    """Registers a delta module as a child of its target, with the hooks that its class and its place ask for."""
    if delta.training is not target.training:
        delta.train(target.training)
    target.add_module(key, delta)
    if delta.reading is None:
        _stand_on(target)
        return
    _replace(backbone.get_submodule(delta.reading.scope), key, delta.reading.holder)
    for other in delta.reading.also:
        source = None if other.owner == delta.reading.owner else delta
        _replace(backbone.get_submodule(other.scope), key, other.holder, source, other.name)


def take(backbone: nn.Module, target: nn.Module, key: str) -> None:
    """Takes a delta module and its hooks away from its target."""
    delta = target._modules[key]
    reading = delta.reading if isinstance(delta, DeltaModule) else None
    scopes = [reading.scope, *(other.scope for other in reading.also)] if reading is not None else []
    for scope in map(backbone.get_submodule, dict.fromkeys(scopes)):
        for hook in _ours(scope, Replace):
            if hook.delta(scope) is delta:
                hook.handle.remove()
    del target._modules[key]
    if reading is None:
        _stand_on(target)


def _ours(module: nn.Module, kind: type[Any]) -> list[Any]:
    tables = (module._forward_pre_hooks, module._forward_hooks)
    return [hook for table in tables for hook in table.values() if isinstance(hook, kind)]


def _stand_on(target: nn.Module) -> None:
    """Registers the hooks of all delta modules on a target anew: they apply in the order of their first attachment.

    Ahead of everybody else's, because transformers installs the hooks that capture hidden states lazily, at the first call
    that asks for them: a delta attached later would be missing from what they capture.
    """
    for hook in _ours(target, Ahead):
        hook.handle.remove()
    there = [(key, child) for key, child in target._modules.items() if isinstance(child, DeltaModule)]
    held = sorted(((key, child) for key, child in there if child.reading is None), key=lambda item: _order(item[1]))
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
    hooks = [*_ours(scope, Replace), Replace(key, holder, source, name), Restore(key, holder, source, name)]
    for hook in hooks:
        if hook.handle is not None:
            hook.handle.remove()
    ordered = sorted(hooks, key=lambda hook: _order(hook.delta(scope)))
    for hook in ordered[::-1]:
        if isinstance(hook, Restore):
            hook.handle = scope.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=True)
        else:
            hook.handle = scope.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


class FirstForward:
    """Finds, in the first forward of the backbone, targets that were never called, and refuses to go on with them.

    Some modules are read and not called (a fused kernel takes `proj.weight`): a hook there never fires, and its delta
    would silently do nothing. Where the module around was called it is an error; where that was not called either (an
    expert that no token was routed to, a vision tower under a batch of text) it is a warning.
    """

    def __init__(self, record: Any) -> None:
        self.record = record
        self.handles: list[Any] = []
        self.watched: list[tuple[str, nn.Module, DeltaModule, Behind | Replace, Ran]] = []

    def begin(self, backbone: nn.Module, args: Any) -> None:
        """Watches the modules around the targets for the time of this forward."""
        if torch.compiler.is_compiling() or not (self.record.active and not self.record.merged):
            return
        self._refuse_offloaded(backbone)
        self.watched = []
        around: dict[nn.Module, Ran] = {}
        for path, module in backbone.named_modules():
            for hook, delta in _served(module):
                # A method that also acts ahead of its target says itself what it needs to see.
                if delta.record is not self.record or type(delta).before is not DeltaModule.before:
                    continue
                parent = _caller(backbone, path)
                if parent not in around:
                    around[parent] = Ran(fired=parent is backbone)
                    around[parent].handle = parent.register_forward_pre_hook(around[parent])
                self.watched.append((path, module, delta, hook, around[parent]))

    def end(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Says which targets were not called, unless the forward failed or was not watched."""
        watched, self.watched = self.watched, []
        for *_, around in watched:
            around.handle.remove()
        # Behind a forward that raised, torch calls with no result what it must always call.
        if torch.compiler.is_compiling() or output is None or not (self.record.active and not self.record.merged):
            return
        # A weight that is read in several places works if one of them was called.
        alive = {id(delta) for _, _, delta, hook, _ in watched if hook.fired}
        dead = [(path, module, delta, around) for path, module, delta, _, around in watched if id(delta) not in alive]
        skipped = [(path, module, delta) for path, module, delta, around in dead if around.fired]
        if skipped:
            raise TargetError(self._never_called(len(skipped), *skipped[0]))
        if not any(map(_offloaded, (delta for _, _, delta, *_ in watched))):
            self.record.checked = True
            for handle in self.handles:
                handle.remove()
        if dead:
            warnings.warn(
                f"delta {self.record.name!r}: {len(dead)} of its targets were not called in the first forward, such as "
                f"{dead[0][0]}, nor was the module around: the delta did nothing there so far",
                DeltaWarning,
                stacklevel=2,
            )

    def _refuse_offloaded(self, backbone: nn.Module) -> None:
        """A delta that was offloaded with its backbone is copied in for each forward: the copies get the gradients."""
        if not (backbone.training and torch.is_grad_enabled()):
            return
        for path, module in backbone.named_modules():
            if isinstance(module, DeltaModule) and module.record is self.record and _offloaded(module):
                raise StateError(
                    f"{path}: delta {self.record.name!r} was offloaded with its backbone, and would not be "
                    "trained: no gradients reach what is offloaded; offload the backbone first, and attach afterwards"
                )

    def _never_called(self, count: int, path: str, module: nn.Module, delta: DeltaModule) -> str:
        more = f" ({count} such targets)" if count > 1 else ""
        head = (
            f"{path}: delta {self.record.name!r} did nothing here{more}: the module around it ran in the first forward "
            f"and never called this {type(module).__name__}; it may read its weight itself. Detach the delta, and "
        )
        if type(delta).weight_update is not DeltaModule.weight_update and delta.reading is None:
            return head + f"name the parameter '{path}.weight' instead, or leave it out with exclude="
        return head + f"leave it out with exclude=, for {type(delta).__name__} has no form that works by the weight"


def _offloaded(delta: DeltaModule) -> bool:
    """Whether accelerate keeps the values of parameters that are to be trained elsewhere, and copies them in when called."""
    return any(
        hasattr(module, "_hf_hook") and parameter.is_meta and parameter.requires_grad
        for module in delta.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def _served(module: nn.Module) -> Iterator[tuple[Behind | Replace, DeltaModule]]:
    """The delta modules that hooks on a module call behind it, or add to a weight that it reads, with these hooks."""
    for hook in (*_ours(module, Behind), *_ours(module, Replace)):
        held = [module._modules[key] for key in hook.delta_keys] if isinstance(hook, Behind) else [hook.delta(module)]
        if not isinstance(hook, Restore):
            yield from ((hook, delta) for delta in held)


def _caller(backbone: nn.Module, path: str) -> nn.Module:
    """The module around a path that can be called: a list of modules cannot."""
    for name in above(path.rpartition(".")[0]):
        module = backbone.get_submodule(name)
        if is_callable(module):
            return module
    return backbone


def watch_first_forward(backbone: nn.Module, record: Any, *, attached: bool) -> None:
    """Puts `FirstForward` on a backbone until the delta's targets were seen, and takes it off with the delta."""
    for hook in list(backbone._forward_hooks.values()):
        first = _watcher(hook)
        if isinstance(first, FirstForward) and first.record is record:
            for handle in first.handles:
                handle.remove()
    if attached and not record.checked:
        first = FirstForward(record)
        first.handles = _around(backbone, first)


def watch(backbone: nn.Module) -> None:
    """Puts on a backbone what must stand there while it holds delta modules, and takes off what need not any more."""
    follow_hooks_when_compiled()
    _stand(
        ReportPart,
        backbone._load_state_dict_pre_hooks,
        lambda watcher: [backbone.register_load_state_dict_pre_hook(watcher)],
        wanted=_watch_inside(backbone, {}),
    )


def _watch_inside(module: nn.Module, known: dict[int, bool]) -> bool:
    """Whether there are delta modules in a module. It is watched as they need it, and so are the modules in it."""
    if id(module) in known:
        return known[id(module)]
    found = known[id(module)] = False
    for child in module._modules.values():
        if isinstance(child, DeltaModule) or (child is not None and _watch_inside(child, known)):
            found = True
    known[id(module)] = found
    if hasattr(type(module), "gradient_checkpointing"):
        _stand(InputGradients, module._forward_pre_hooks, partial(_ahead, module), wanted=found)
    if isinstance(module, nn.TransformerEncoder):
        _stand(Unnested, module._forward_pre_hooks, partial(_around, module), wanted=found)
    return found


def _stand(
    kind: type[Any],
    table: Mapping[int, Any],
    register: Callable[[Any], list[Any]],
    *,
    wanted: bool,
) -> None:
    """Keeps one watcher of a kind on a module as long as it is wanted."""
    there = [watcher for watcher in map(_watcher, table.values()) if isinstance(watcher, kind)]
    if wanted and not there:
        watcher = kind()
        watcher.handles = register(watcher)
    elif not wanted:
        for handle in [handle for watcher in there for handle in watcher.handles]:
            handle.remove()


def _watcher(hook: Any) -> Any:
    # Torch wraps what is called before loading; of a bound method the object is meant.
    hook = getattr(hook, "hook", hook)
    return getattr(hook, "__self__", hook)


def _ahead(module: nn.Module, watcher: Any) -> list[Any]:
    return [module.register_forward_pre_hook(watcher)]


def _around(module: nn.Module, watcher: Any) -> list[Any]:
    begin = module.register_forward_pre_hook(watcher.begin)
    return [begin, module.register_forward_hook(watcher.end, always_call=True)]


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
