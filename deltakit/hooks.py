"""The only file that registers hooks: it puts a delta module at its target and takes it away again."""

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from deltakit.calls import After, Before, Replace, Restore
from deltakit.errors import DeltaWarning, TargetError
from deltakit.inference.walk import above, is_callable
from deltakit.method import DeltaModule
from deltakit.watchers import InputGradients, Ran, ReportPart, Unnested


def put(backbone: nn.Module, target: nn.Module, key: str, delta: DeltaModule) -> None:
    """Registers a delta module as a child of its target, with the hooks that its class and its place ask for."""
    delta.train(target.training)
    target.add_module(key, delta)
    kind, reading = type(delta), delta.reading
    hooked, hooks = target, list[Before]()
    if reading is not None:
        hooked = backbone.get_submodule(reading.scope)
        hooks = [Replace(key, reading.holder), Restore(key, reading.holder)]
        for other in reading.also:
            source = None if other.owner == reading.owner else delta
            there = [made(key, other.holder, source, other.name) for made in (Replace, Restore)]
            around = backbone.get_submodule(other.scope)
            _register(around, [*_ours(around), *there])
    else:
        if kind.before is not DeltaModule.before:
            hooks.append(Before(key))
        if kind.after is not DeltaModule.after or kind.forward is not DeltaModule.forward:
            hooks.append(After(key))
    if hooks:
        _register(hooked, [*_ours(hooked), *hooks])
    follow_hooks_when_compiled()


def take(backbone: nn.Module, target: nn.Module, key: str) -> None:
    """Takes a delta module and its hooks away from its target."""
    delta = target._modules[key]
    reading = delta.reading if isinstance(delta, DeltaModule) else None
    scopes = [reading.scope, *(other.scope for other in reading.also)] if reading is not None else None
    for hooked in [target] if scopes is None else map(backbone.get_submodule, dict.fromkeys(scopes)):
        for hook in _ours(hooked):
            if hook.delta(hooked) is delta:
                hook.handle.remove()
    del target._modules[key]
    follow_hooks_when_compiled()


def _ours(target: nn.Module) -> list[Before]:
    tables = (target._forward_pre_hooks, target._forward_hooks)
    return [hook for table in tables for hook in table.values() if isinstance(hook, Before)]


def _register(target: nn.Module, hooks: list[Before]) -> None:
    """Registers hooks in the order in which their deltas were first attached, ahead of everybody else's.

    Ahead, because transformers installs the hooks that capture hidden states lazily, at the first call that asks for
    them: a delta attached later would be missing from what they capture.
    """
    for hook in hooks:
        if hook.handle is not None:
            hook.handle.remove()
    for hook in sorted(hooks, key=lambda hook: _order(target, hook), reverse=True):
        if isinstance(hook, After | Restore):
            always = isinstance(hook, Restore) or type(hook.delta(target)).always_after  # type: ignore[union-attr]
            hook.handle = target.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=always)
        else:
            hook.handle = target.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def _order(target: nn.Module, hook: Before) -> tuple[int, int]:
    delta = hook.delta(target)
    if delta is None:
        return 0, 0
    held = list(target.get_submodule(hook.holder)._modules)
    return delta.record.order if delta.record is not None else 0, held.index(hook.key) if hook.key in held else 0


class FirstForward:
    """Finds, in the first forward of the backbone, targets that were never called, and refuses to go on with them.

    Some modules are read and not called (a fused kernel takes `proj.weight`): a hook there never fires, and its delta
    would silently do nothing. Where the module around was called it is an error; where that was not called either (an
    expert that no token was routed to, a vision tower under a batch of text) it is a warning.
    """

    def __init__(self, record: Any) -> None:
        self.record = record
        self.handles: list[Any] = []
        self.watched: list[tuple[str, nn.Module, DeltaModule, Before, Ran]] = []

    def begin(self, backbone: nn.Module, args: Any) -> None:
        """Watches the modules around the targets for the time of this forward."""
        if torch.compiler.is_compiling() or not (self.record.active and not self.record.merged):
            return
        self.watched = []
        around: dict[int, Ran] = {}
        for path, module in backbone.named_modules():
            for hook in _ours(module):
                delta = hook.delta(module)
                # A method that also acts ahead of its target says itself what it needs to see.
                own = delta is not None and type(delta).before is DeltaModule.before
                if delta is None or delta.record is not self.record or not own:
                    continue
                if isinstance(hook, After) or type(hook) is Replace:
                    parent = _caller(backbone, path)
                    if id(parent) not in around:
                        around[id(parent)] = Ran(fired=parent is backbone)
                        around[id(parent)].handle = parent.register_forward_pre_hook(around[id(parent)])
                    self.watched.append((path, module, delta, hook, around[id(parent)]))

    def end(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Says which targets were not called, unless the forward failed or was not watched."""
        watched, self.watched = self.watched, []
        for *_, ran in watched:
            ran.handle.remove()
        # Behind a forward that raised, torch calls with no result what it must always call.
        if torch.compiler.is_compiling() or output is None or not (self.record.active and not self.record.merged):
            return
        # A weight that is read in several places works if one of them was called.
        alive = {id(delta) for _, _, delta, hook, _ in watched if hook.fired}
        dead = [(path, module, delta, ran) for path, module, delta, _, ran in watched if id(delta) not in alive]
        skipped = [(path, module, delta) for path, module, delta, ran in dead if ran.fired]
        if skipped:
            raise TargetError(self._never_called(len(skipped), *skipped[0]))
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

    def _never_called(self, count: int, path: str, module: nn.Module, delta: DeltaModule) -> str:
        more = f" ({count} such targets)" if count > 1 else ""
        head = (
            f"{path}: delta {self.record.name!r} did nothing here{more}: the module around it ran in the first forward "
            f"and never called this {type(module).__name__}; it may read its weight itself. Detach the delta, and "
        )
        if type(delta).weight_update is not DeltaModule.weight_update and delta.reading is None:
            return head + f"name the parameter '{path}.weight' instead, or leave it out with exclude="
        return head + f"leave it out with exclude=, for {type(delta).__name__} has no form that works by the weight"


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
    _stand(
        backbone,
        ReportPart,
        backbone._load_state_dict_pre_hooks,
        lambda watcher: [backbone.register_load_state_dict_pre_hook(watcher)],
    )
    for module in backbone.modules():
        if hasattr(type(module), "gradient_checkpointing"):
            _stand(module, InputGradients, module._forward_pre_hooks, partial(_ahead, module))
        if isinstance(module, nn.TransformerEncoder):
            _stand(module, Unnested, module._forward_pre_hooks, partial(_around, module))


def _stand(module: nn.Module, kind: type[Any], table: Mapping[int, Any], register: Callable[[Any], list[Any]]) -> None:
    """Keeps one watcher of a kind on a module as long as there are delta modules in it."""
    there = [watcher for watcher in map(_watcher, table.values()) if isinstance(watcher, kind)]
    wanted = any(isinstance(inner, DeltaModule) for inner in module.modules())
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
