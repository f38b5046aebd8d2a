"""The check that the first forward of a backbone calls every target."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltakit.core import DeltaModule, Record, above, is_callable
from deltakit.errors import DeltaWarning, StateError, TargetError
from deltakit.injection.backbone_guards import Ran, register_around, watcher_of
from deltakit.injection.output_hooks import InputHook, OutputHook, ours
from deltakit.injection.weight_patch import PatchHook, UnpatchHook

Hook = InputHook | OutputHook | PatchHook


class FirstForward:
    """Raises an error if the first forward of the backbone never called a target.

    Some modules are never called, because another one uses their weight directly (a fused kernel takes `proj.weight`). A
    hook there never runs, so the delta would silently do nothing. It is an error if the surrounding module was called, and
    a warning if it was not (an expert that no token was routed to, a vision tower in a batch of text).
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.handles: list[Any] = []
        self.watched: list[tuple[str, nn.Module, DeltaModule, Hook, Ran]] = []

    def begin(self, backbone: nn.Module, args: Any) -> None:
        """Starts watching the targets and the modules around them.

        Raises:
            StateError: if the backbone is trained and the delta was offloaded with it.
        """
        # Dynamo cannot trace the registration of hooks.
        if torch.compiler.is_compiling() or not self.record.live:
            return
        self._refuse_offloaded(backbone)
        self.watched = []
        around: dict[nn.Module, Ran] = {}
        for path, module in backbone.named_modules():
            for hook, delta in _served(module):
                if delta.record is not self.record or not delta.must_be_called:
                    continue
                # If the surrounding module did not run either, the target had no chance to be called. Its hook tells the
                # two cases apart. The backbone itself is running now, so it counts as called.
                parent = _caller(backbone, path)
                if parent not in around:
                    around[parent] = Ran(fired=parent is backbone)
                    around[parent].handle = parent.register_forward_pre_hook(around[parent])
                self.watched.append((path, module, delta, hook, around[parent]))

    def end(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Checks the targets after a forward, unless it failed or was compiled.

        Raises:
            TargetError: if a target was never called, but the module around it was.
        """
        watched, self.watched = self.watched, []
        for *_, around in watched:
            around.handle.remove()
        # After a forward that raised, torch calls hooks with `always_call` with None as the output.
        if torch.compiler.is_compiling() or output is None or not self.record.live:
            return
        # One delta may have several hooks (a tied weight is read in several modules). It is enough if one of them ran.
        ran = {id(delta) for _, _, delta, hook, _ in watched if hook.fired}
        silent = [(path, module, delta, around) for path, module, delta, _, around in watched if id(delta) not in ran]
        skipped = [(path, module, delta) for path, module, delta, around in silent if around.fired]
        if skipped:
            raise TargetError(self._never_called(len(skipped), *skipped[0]))
        # With an offloaded delta the check goes on in later forwards, because it must also run before the first training.
        if not any(map(_offloaded, (delta for _, _, delta, *_ in watched))):
            self.record.checked = True
            for handle in self.handles:
                handle.remove()
        if silent:
            warnings.warn(
                f"delta {self.record.name!r}: {len(silent)} of its targets were not called in the first forward, such as "
                f"{silent[0][0]}, and neither was the module around it: the delta did nothing there so far; if these modules "
                "are not used by your data, leave them out with exclude=",
                DeltaWarning,
                stacklevel=2,
            )

    def _refuse_offloaded(self, backbone: nn.Module) -> None:
        """Raises StateError if the backbone is in training and the delta was offloaded with it."""
        # accelerate copies offloaded parameters to the device for each forward. The copies get the gradients, and are
        # thrown away with them: training would run and change nothing.
        if not (backbone.training and torch.is_grad_enabled()):
            return
        name = self.record.name
        for path, module in backbone.named_modules():
            if isinstance(module, DeltaModule) and module.record is self.record and _offloaded(module):
                raise StateError(
                    f"{path}: delta {name!r} was offloaded with its backbone and would not be trained, because offloaded "
                    "parameters get no gradients; offload the backbone first and attach the delta afterwards"
                )

    def _never_called(self, count: int, path: str, module: nn.Module, delta: DeltaModule) -> str:
        more = f" ({count} such targets)" if count > 1 else ""
        head = (
            f"{path}: delta {self.record.name!r} did nothing here{more}: in the first forward this "
            f"{type(module).__name__} was never called though the module around it ran, which probably uses the weight "
            "directly; detach the delta, and attach it again with "
        )
        if delta.has_weight_form and delta.weight_read is None:
            return head + f"at='{path}.weight' (a weight patch) or without this module (exclude=)"
        return head + f"exclude= for this module, because {delta.word()} has no weight patch"


def _offloaded(delta: DeltaModule) -> bool:
    """Returns whether accelerate offloaded trained parameters of a delta module, and copies them in for each call."""
    return any(
        hasattr(module, "_hf_hook") and parameter.is_meta and parameter.requires_grad
        for module in delta.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def _served(module: nn.Module) -> Iterator[tuple[Hook, DeltaModule]]:
    """Yields the hooks on a module, each with a delta module that it calls or whose weight patch it applies."""
    for hook in (*ours(module, InputHook), *ours(module, OutputHook)):
        yield from ((hook, module._modules[key]) for key in hook.delta_keys)
    for hook in ours(module, PatchHook):
        if not isinstance(hook, UnpatchHook):
            yield hook, hook.delta(module)


def _caller(backbone: nn.Module, path: str) -> nn.Module:
    """Returns the innermost module around a path that can be called: a list of modules cannot."""
    for name in above(path.rpartition(".")[0]):
        module = backbone.get_submodule(name)
        if is_callable(module):
            return module
    return backbone


def watch_first_forward(backbone: nn.Module, record: Record, *, attached: bool) -> None:
    """Registers `FirstForward` on a backbone until the delta's targets were checked, and removes it on detach."""
    for hook in list(backbone._forward_hooks.values()):
        first = watcher_of(hook)
        if isinstance(first, FirstForward) and first.record is record:
            for handle in first.handles:
                handle.remove()
    if attached and not record.checked:
        first = FirstForward(record)
        first.handles = register_around(backbone, first)
