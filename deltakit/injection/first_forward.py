"""The check that the first forward of a backbone calls every target."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltakit.core import DeltaModule, above, is_callable
from deltakit.errors import DeltaWarning, StateError, TargetError
from deltakit.injection.backbone_guards import Ran, register_around, watcher_of
from deltakit.injection.output_hooks import InputHook, OutputHook, ours
from deltakit.injection.weight_patch import PatchHook, UnpatchHook

Hook = InputHook | OutputHook | PatchHook


class FirstForward:
    """Finds, in the first forward of the backbone, targets that were never called, and refuses to go on with them.

    Some modules are read and not called (a fused kernel takes `proj.weight`): a hook there never fires, and its delta
    would silently do nothing. Where the module around was called it is an error; where that was not called either (an
    expert that no token was routed to, a vision tower under a batch of text) it is a warning.
    """

    def __init__(self, record: Any) -> None:
        self.record = record
        self.handles: list[Any] = []
        self.watched: list[tuple[str, nn.Module, DeltaModule, Hook, Ran]] = []

    def begin(self, backbone: nn.Module, args: Any) -> None:
        """Watches the modules around the targets for the time of this forward."""
        if torch.compiler.is_compiling() or not self.record.live:
            return
        self._refuse_offloaded(backbone)
        self.watched = []
        around: dict[nn.Module, Ran] = {}
        for path, module in backbone.named_modules():
            for hook, delta in _served(module):
                if delta.record is not self.record or not delta.must_be_called:
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
        if torch.compiler.is_compiling() or output is None or not self.record.live:
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
        name = self.record.name
        for path, module in backbone.named_modules():
            if isinstance(module, DeltaModule) and module.record is self.record and _offloaded(module):
                raise StateError(
                    f"{path}: delta {name!r} was offloaded with its backbone, and would not be "
                    "trained: no gradients reach what is offloaded; offload the backbone first, and attach afterwards"
                )

    def _never_called(self, count: int, path: str, module: nn.Module, delta: DeltaModule) -> str:
        more = f" ({count} such targets)" if count > 1 else ""
        head = (
            f"{path}: delta {self.record.name!r} did nothing here{more}: the module around it ran in the first forward "
            f"and never called this {type(module).__name__}; it may read its weight itself. Detach the delta, and "
        )
        if delta.has_weight_form and delta.weight_read is None:
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


def _served(module: nn.Module) -> Iterator[tuple[Hook, DeltaModule]]:
    """The delta modules that hooks on a module call or add to a weight that it reads, with these hooks."""
    for hook in (*ours(module, InputHook), *ours(module, OutputHook)):
        yield from ((hook, module._modules[key]) for key in hook.delta_keys)
    for hook in ours(module, PatchHook):
        if not isinstance(hook, UnpatchHook):
            yield hook, hook.delta(module)


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
        first = watcher_of(hook)
        if isinstance(first, FirstForward) and first.record is record:
            for handle in first.handles:
                handle.remove()
    if attached and not record.checked:
        first = FirstForward(record)
        first.handles = register_around(backbone, first)
