"""Hooks on targets: they call the delta modules that stand there, ahead of the target and behind it.

A hook looks its delta modules up from the module that is called, by key: so it stays right in a deepcopy, in a pickle and in
the replicas of `nn.DataParallel`, which share one table of hooks.
"""

from typing import Any

from torch import nn


class InputHook:
    """Calls the delta modules of a target ahead of it, one after the other: one hook, however many there are."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.delta_keys = keys
        self.handle: Any = None
        self.fired = False

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.fired = True
        changed = False
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is None or not delta.live:
                continue
            new = delta.before_call(target, args, kwargs)
            if new is not None:
                (args, kwargs), changed = new, True
        return (args, kwargs) if changed else None


class OutputHook:
    """Calls the delta modules of a target behind it, each with what the one before it made of the output."""

    def __init__(self, keys: tuple[str, ...], *, always: bool) -> None:
        self.delta_keys = keys
        self.handle: Any = None
        self.fired = False
        self.always = always
        """Whether torch calls it also when the target's forward raised: for those that must clean up."""

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.fired = True
        if not self.always:
            return self._through(target, args, kwargs, output)
        # Behind a forward that raised, torch gives no output.
        if output is None:
            return self._abandon(target)
        try:
            return self._through(target, args, kwargs, output)
        except BaseException:
            # Torch has called this hook already, and does not call it again.
            self._abandon(target)
            raise

    def _through(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # In every call of every target: nothing is asked twice here.
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is None:
                continue
            record = delta.record
            if record is not None and not record.live:
                continue
            if record is None or record.batch is None:
                new = delta.after_call(target, args, kwargs, output)
            else:
                first = record.batch.first.get(target)
                if first is not None and first is not delta:
                    continue
                new = delta.after_call_mixed(target, args, kwargs, output, record.batch)
            if new is not None:
                output = new
        return output

    def _abandon(self, target: nn.Module) -> None:
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is not None:
                delta.abandon(target)


def ours(module: nn.Module, kind: type[Any]) -> list[Any]:
    """The hooks of one of our classes on a module."""
    tables = (module._forward_pre_hooks, module._forward_hooks)
    return [hook for table in tables for hook in table.values() if isinstance(hook, kind)]
