"""Input and output hooks: they call the delta modules of a target before and after the target.

A hook looks its delta modules up by key in the module that is called, and has no references to them. So it also works in a
deepcopy, after unpickling, and in the replicas of `nn.DataParallel`, which share one table of hooks. A parameter captured by a
hook would not be trained under FSDP2, which replaces parameters: its gradient stays None, silently (measured).
"""

from typing import Any

from torch import nn

from deltakit.core import rows_now

_UNKNOWN = object()


class InputHook:
    """Calls all delta modules that change a target's input, before the target.

    There is one hook for all of them: each further hook would cost 0.7 us per call (measured on a CPU).
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.delta_keys = keys
        # The handle of torch's registration, kept here because handles outside of the model do not follow a deepcopy.
        self.handle: Any = None
        # Read by the check of the first forward.
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
    """Calls all delta modules that change a target's output, after the target. Each gets the output of the one before."""

    def __init__(self, keys: tuple[str, ...], *, always: bool) -> None:
        self.delta_keys = keys
        self.handle: Any = None
        self.fired = False
        self.always = always
        """Whether torch calls it after a forward that raised, too. Call contexts need that to clean up."""

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.fired = True
        if not self.always:
            return self._through(target, args, kwargs, output)
        # After a forward that raised, torch passes None as the output.
        if output is None:
            return self._abandon(target)
        try:
            return self._through(target, args, kwargs, output)
        except BaseException:
            # torch has called this hook already and does not call it again for this exception.
            self._abandon(target)
            raise

    def _through(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # This runs in every call of every target, so it reads each attribute once.
        batch: Any = _UNKNOWN
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is None:
                continue
            record = delta.record
            # What `record.live` says, without the call of a property.
            if record is not None and (not record.active or record.weights_before_merge):
                continue
            # Nearly always no rows are in use at all. If they are, all deltas of the backbone have the same.
            if record is None or not record.has_rows:
                own = None
            else:
                own = batch = rows_now(record, delta) if batch is _UNKNOWN else batch
            if own is None:
                new = delta.after_call(target, args, kwargs, output)
            else:
                # The first low-rank delta at a target computes the batched product for all of them.
                first = own.first.get(target)
                if first is not None and first is not delta:
                    continue
                new = delta.after_call_mixed(target, args, kwargs, output, own)
            if new is not None:
                output = new
        return output

    def _abandon(self, target: nn.Module) -> None:
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is not None:
                delta.abandon(target)


def ours(module: nn.Module, kind: type[Any]) -> list[Any]:
    """Returns the hooks of one of our classes on a module."""
    tables = (module._forward_pre_hooks, module._forward_hooks)
    return [hook for table in tables for hook in table.values() if isinstance(hook, kind)]
