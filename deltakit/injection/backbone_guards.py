"""What stands on a backbone beside the deltas' own hooks, while deltas are attached: called by hooks of `hooks.py`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from deltakit.core import DeltaModule
from deltakit.errors import StateError
from deltakit.injection.hooks import follow_hooks_when_compiled


class InputGradients:
    """Lets gradients reach the deltas of a block under reentrant checkpointing.

    Reentrant checkpointing gives no gradients at all when none of its inputs asks for one, which is so when everything
    below is frozen. The hook stands only on blocks that hold deltas: nothing is forced to carry gradients below them.
    """

    def __init__(self) -> None:
        self.handles: list[Any] = []

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

    A state dict with nothing of a delta is a base checkpoint, which loads strictly; one with a part of it is damaged. One with
    weights that a delta is merged into is refused.
    """

    def __init__(self) -> None:
        self.handles: list[Any] = []

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
        merged = {
            f"{prefix}{name}": module.record.name
            for module in backbone.modules()
            if isinstance(module, DeltaModule) and module.record is not None
            for name in module.record.weights_before_merge
        }
        for name in (name for name in merged if name in state):
            raise StateError(
                f"{name}: delta {merged[name]!r} is merged into it, and unmerging would put the old weight back: unmerge() it "
                "before loading the backbone's weights"
            )
        held: dict[int, list[tuple[str, bool]]] = {}
        for path, module in backbone.named_modules(prefix=prefix.rstrip(".")):
            if isinstance(module, DeltaModule):
                keys = module.state_dict(prefix=f"{path}.")
                present = not keys.keys().isdisjoint(state)
                held.setdefault(id(module.record), []).extend((key, present) for key in keys)
        for keys_of_delta in held.values():
            if any(present for _, present in keys_of_delta):
                missing += [key for key, present in keys_of_delta if not present]


class Ran:
    """Notes that a module was called."""

    def __init__(self, *, fired: bool) -> None:
        self.fired = fired
        self.handle: Any = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.fired = True


class Unnested:
    """Keeps torch's encoder from making nested tensors of padded batches, for the time of its forward.

    It makes them in evaluation for its fused layers alone (`nn.TransformerEncoder.forward`); a layer with a delta on it goes
    the usual way, which takes none.
    """

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def begin(self, encoder: nn.Module, args: Any) -> None:
        if encoder.__dict__.get("use_nested_tensor") is True:
            encoder.__dict__["use_nested_tensor"] = _Was()

    def end(self, encoder: nn.Module, args: Any, output: Any) -> None:
        if isinstance(encoder.__dict__.get("use_nested_tensor"), _Was):
            encoder.__dict__["use_nested_tensor"] = True


class _Was:
    """Stands for a True that counts as False for now."""

    def __bool__(self) -> bool:
        return False


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
        _stand(Unnested, module._forward_pre_hooks, partial(register_around, module), wanted=found)
    return found


def _stand(
    kind: type[Any],
    table: Mapping[int, Any],
    register: Callable[[Any], list[Any]],
    *,
    wanted: bool,
) -> None:
    """Keeps one watcher of a kind on a module as long as it is wanted."""
    there = [watcher for watcher in map(watcher_of, table.values()) if isinstance(watcher, kind)]
    if wanted and not there:
        watcher = kind()
        watcher.handles = register(watcher)
    elif not wanted:
        for handle in [handle for watcher in there for handle in watcher.handles]:
            handle.remove()


def watcher_of(hook: Any) -> Any:
    # Torch wraps what is called before loading; of a bound method the object is meant.
    hook = getattr(hook, "hook", hook)
    return getattr(hook, "__self__", hook)


def _ahead(module: nn.Module, watcher: Any) -> list[Any]:
    return [module.register_forward_pre_hook(watcher)]


def register_around(module: nn.Module, watcher: Any) -> list[Any]:
    begin = module.register_forward_pre_hook(watcher.begin)
    return [begin, module.register_forward_hook(watcher.end, always_call=True)]
