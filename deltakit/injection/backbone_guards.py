"""Backbone guards: hooks that a backbone needs besides the deltas' own, while deltas are attached."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from deltakit.core import Attachment, DeltaModule, notice_moved_buffers, records_of
from deltakit.errors import StateError
from deltakit.injection.call_observer import CallObserver
from deltakit.injection.hooks import follow_hooks_when_compiled
from deltakit.injection.rows_observer import forget_rows, observe_rows
from deltakit.injection.training_guard import TrainingGuard

_NESTED = "_deltakit_nested"


class InputGradients:
    """Makes gradients reach the deltas of a block under reentrant checkpointing.

    Reentrant checkpointing computes no gradients if no input of the block requires them, which is the case when everything
    below is frozen. Only blocks with deltas get this hook, so that the backward pass still stops at the lowest delta.
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
    """Reports the missing keys of a delta when a state dict has some of its tensors, but not all.

    A state dict without any tensor of a delta is a base checkpoint, and loads with `strict=True`. Loading weights that a
    delta is merged into raises a `StateError`.
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
                f"{name}: delta {merged[name]!r} is merged into this weight, and unmerging would restore the old weight; "
                "unmerge() the delta before loading the backbone's weights"
            )
        held: dict[int, list[tuple[str, bool]]] = {}
        for path, module in backbone.named_modules(prefix=prefix.rstrip(".")):
            if isinstance(module, DeltaModule):
                keys = module.state_dict(prefix=f"{path}.")
                present = not keys.keys().isdisjoint(state)
                held.setdefault(id(module.record), []).extend((key, present) for key in keys)
        if not any(present for keys_of_delta in held.values() for _, present in keys_of_delta):
            _take_statistics(backbone, state, prefix)
        for keys_of_delta in held.values():
            if any(present for _, present in keys_of_delta):
                missing += [key for key, present in keys_of_delta if not present]


def _take_statistics(backbone: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Makes the buffers of a base checkpoint the backbone's own. Otherwise detaching would put the old ones back over them."""
    for record in records_of(backbone)[:1]:
        notice_moved_buffers(backbone, record)
        for name, own in record.buffer_ledger.own.items():
            loaded = state.get(f"{prefix}{name}")
            if isinstance(loaded, torch.Tensor) and loaded.shape == own.shape:
                record.buffer_ledger.accept(name, loaded)


class Ran:
    """Records that a module was called."""

    def __init__(self, *, fired: bool) -> None:
        self.fired = fired
        self.handle: Any = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.fired = True


def watch(backbone: nn.Module) -> None:
    """Adds the guards that a backbone needs for its current delta modules, and removes all others."""
    follow_hooks_when_compiled()
    found: list[DeltaModule] = []
    holds = _watch_inside(backbone, {}, found)
    _stand(
        ReportPart,
        backbone._load_state_dict_pre_hooks,
        lambda watcher: [backbone.register_load_state_dict_pre_hook(watcher)],
        wanted=holds,
    )
    _stand(TrainingGuard, backbone._forward_pre_hooks, partial(_ahead, backbone), wanted=holds)
    for guard in map(watcher_of, backbone._forward_pre_hooks.values()):
        if isinstance(guard, TrainingGuard):
            guard.follow(found)
    observe = partial(register_around, backbone, with_kwargs=True)
    _stand(CallObserver, backbone._forward_pre_hooks, observe, wanted=any(delta.reads_call for delta in found))


def _watch_inside(module: nn.Module, known: dict[int, bool], deltas: list[DeltaModule]) -> bool:
    """Sets the guards of a module and the modules in it, and returns whether there are delta modules in it.

    Args:
        known: the results for modules that were visited before, by id.
        deltas: the list to which the delta modules are added.
    """
    if id(module) in known:
        return known[id(module)]
    found = known[id(module)] = False
    for child in module._modules.values():
        if isinstance(child, DeltaModule):
            deltas.append(child)
            found = True
        elif child is not None and _watch_inside(child, known, deltas):
            found = True
    known[id(module)] = found
    if not found:
        forget_rows(module)
    if hasattr(type(module), "gradient_checkpointing"):
        _stand(InputGradients, module._forward_pre_hooks, partial(_ahead, module), wanted=found)
    if isinstance(module, nn.TransformerEncoder):
        _keep_unnested(module, wanted=found)
    return found


def watch_rows(backbone: nn.Module, attached: Sequence[Attachment]) -> None:
    """Adds the hooks that note rows on graphs, when a backbone is first used with `rows`. `watch` removes them on detach.

    Backbones that are never used with `rows` do not pay for these hooks.
    """
    records = [attachment.record for attachment in attached]
    # `watch` looks for hooks in the module that a delta was attached to, and in those inside. This may be a part of the
    # backbone that `rows` was given, or the other way round.
    roots = [module for module in backbone.modules() if module._load_state_dict_pre_hooks and _is_root(module)]
    inside = {id(module) for root in roots for module in root.modules()}
    if any(id(site.target) not in inside for attachment in attached for site in attachment.sites):
        roots.append(backbone)
    for root in roots:
        observe_rows(root, records)


def _is_root(module: nn.Module) -> bool:
    return any(isinstance(watcher_of(hook), ReportPart) for hook in module._load_state_dict_pre_hooks.values())


def _stand(
    kind: type[Any],
    table: Mapping[int, Any],
    register: Callable[[Any], list[Any]],
    *,
    wanted: bool,
) -> None:
    """Registers one watcher of a kind on a module if it is wanted, and removes it if not.

    Args:
        table: the module's hooks among which the watcher is.
        register: registers a watcher and returns the handles.
    """
    there = [watcher for watcher in map(watcher_of, table.values()) if isinstance(watcher, kind)]
    if wanted and not there:
        watcher = kind()
        watcher.handles = register(watcher)
    elif not wanted:
        for handle in [handle for watcher in there for handle in watcher.handles]:
            handle.remove()


def watcher_of(hook: Any) -> Any:
    """Returns the object whose method a hook is, or the hook itself."""
    # torch wraps the hooks that it calls before loading a state dict.
    hook = getattr(hook, "hook", hook)
    return getattr(hook, "__self__", hook)


def _ahead(module: nn.Module, watcher: Any) -> list[Any]:
    return [module.register_forward_pre_hook(watcher)]


def register_around(module: nn.Module, watcher: Any, *, with_kwargs: bool = False) -> list[Any]:
    """Calls `begin` and `end` of a watcher around the forwards of a module, and returns the handles."""
    begin = module.register_forward_pre_hook(watcher.begin, with_kwargs=with_kwargs)
    return [begin, module.register_forward_hook(watcher.end, always_call=True)]


def _keep_unnested(encoder: nn.TransformerEncoder, *, wanted: bool) -> None:
    """Stops torch's encoder from making nested tensors of padded batches while it has delta modules.

    In evaluation it makes them for its fused layers (`nn.TransformerEncoder.forward`). A layer with a delta is not fused and
    does not accept them.
    """
    if wanted and getattr(encoder, "use_nested_tensor", False):
        encoder.use_nested_tensor = False
        encoder.__dict__[_NESTED] = True
    elif not wanted and encoder.__dict__.pop(_NESTED, False):
        encoder.use_nested_tensor = True
