"""The only file that registers hooks: it puts a delta module at its target and takes it away again."""

import sys
import warnings
from typing import Any

import torch
from torch import nn

from deltakit.errors import DeltaWarning
from deltakit.method import DeltaModule


class Before:
    """Calls a delta module ahead of its target.

    The delta module is looked up from the module that is called, by its key: so a hook stays right in a deepcopy, in
    a pickle and in the replicas of `nn.DataParallel`, which share one table of hooks.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.handle: Any = None

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        delta = target._modules.get(self.key)
        return delta.before(target, args, kwargs) if isinstance(delta, DeltaModule) and delta.live else None


class After(Before):
    """Calls a delta module behind its target, and notes that the target was called at all."""

    fired: bool = False

    def __call__(  # type: ignore[override]
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not torch.compiler.is_compiling():
            self.fired = True
        delta = target._modules.get(self.key)
        return delta.after(target, args, kwargs, output) if isinstance(delta, DeltaModule) and delta.live else None


def put(target: nn.Module, key: str, delta: DeltaModule) -> None:
    """Registers a delta module as a child of its target, with the hooks that its class asks for."""
    delta.train(target.training)
    target.add_module(key, delta)
    kind = type(delta)
    hooks = []
    if kind.before is not DeltaModule.before:
        hooks.append(Before(key))
    if kind.after is not DeltaModule.after or kind.forward is not DeltaModule.forward:
        hooks.append(After(key))
    if hooks:
        _register(target, [*_ours(target), *hooks])
    follow_hooks_when_compiled()


def take(target: nn.Module, key: str) -> None:
    """Takes a delta module and its hooks away from its target."""
    for hook in _ours(target):
        if hook.key == key:
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
        if isinstance(hook, After):
            always = type(target._modules[hook.key]).always_after  # type: ignore[union-attr]
            hook.handle = target.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=always)
        else:
            hook.handle = target.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def _order(target: nn.Module, hook: Before) -> tuple[int, int]:
    delta = target._modules[hook.key]
    order = delta.record.order if isinstance(delta, DeltaModule) and delta.record is not None else 0
    return order, list(target._modules).index(hook.key)


class InputGradients:
    """Lets gradients reach the deltas of a block under reentrant checkpointing.

    Reentrant checkpointing gives no gradients at all when none of its inputs asks for one, which is so when everything
    below is frozen. The hook stands only on blocks that hold deltas: nothing is forced to carry gradients below them.
    """

    def __init__(self) -> None:
        self.handle: Any = None

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


class ReportPart:
    """Reports keys as missing when a state dict holds a delta in part.

    A state dict with nothing of a delta is a base checkpoint, which loads strictly; one with a part of it is damaged.
    """

    def __init__(self) -> None:
        self.handle: Any = None

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


def watch_loading(backbone: nn.Module) -> None:
    """Puts `ReportPart` on a backbone that holds delta modules, and takes it off one that does not."""
    hooks = [
        hook for hook in map(_unwrapped, backbone._load_state_dict_pre_hooks.values()) if isinstance(hook, ReportPart)
    ]
    wanted = any(isinstance(module, DeltaModule) for module in backbone.modules())
    if wanted and not hooks:
        hook = ReportPart()
        hook.handle = backbone.register_load_state_dict_pre_hook(hook)
    elif not wanted:
        for hook in hooks:
            hook.handle.remove()


def _unwrapped(hook: Any) -> Any:
    return getattr(hook, "hook", hook)


class FirstForward:
    """Warns, after the first forward of the backbone, of targets that were never called.

    Some modules are read and not called (a fused kernel takes `proj.weight`): a hook there never fires, and its delta
    would silently do nothing. It is a warning, as an expert that no token was routed to is not called either.
    """

    def __init__(self, record: Any) -> None:
        self.record = record
        self.handle: Any = None

    def __call__(self, backbone: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not (self.record.active and not self.record.merged):
            return
        self.handle.remove()
        self.record.checked = True
        dead = [
            path for path, module in backbone.named_modules() for hook in _ours(module) if self._is_dead(module, hook)
        ]
        if dead:
            warnings.warn(
                f"delta {self.record.name!r}: {len(dead)} of its targets were not called in the first forward, such as "
                f"{dead[0]}: if its weight is read without calling it, the delta does nothing there; choose the module "
                "that is called, or leave it out with exclude=",
                DeltaWarning,
                stacklevel=2,
            )

    def _is_dead(self, module: nn.Module, hook: Before) -> bool:
        delta = module._modules.get(hook.key)
        # A method with hooks of its own kind says itself what it needs to see.
        if not isinstance(delta, DeltaModule) or type(delta).after is not DeltaModule.after:
            return False
        return delta.record is self.record and isinstance(hook, After) and not hook.fired


def watch_first_forward(backbone: nn.Module, record: Any, *, attached: bool) -> None:
    """Puts `FirstForward` on a backbone until the delta's targets were seen, and takes it off with the delta."""
    for hook in list(backbone._forward_hooks.values()):
        if isinstance(hook, FirstForward) and hook.record is record:
            hook.handle.remove()
    if attached and not record.checked:
        first = FirstForward(record)
        first.handle = backbone.register_forward_hook(first)


def feed_gradients(backbone: nn.Module) -> None:
    """Puts `InputGradients` on every checkpointing block that holds a delta module, and takes it off all others."""
    for block in backbone.modules():
        if not hasattr(type(block), "gradient_checkpointing"):
            continue
        hooks = [hook for hook in block._forward_pre_hooks.values() if isinstance(hook, InputGradients)]
        wanted = any(isinstance(module, DeltaModule) for module in block.modules())
        if wanted and not hooks:
            hook = InputGradients()
            hook.handle = block.register_forward_pre_hook(hook)
        elif not wanted:
            for hook in hooks:
                hook.handle.remove()


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
