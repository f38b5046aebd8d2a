"""What is called when a hook fires: a delta module ahead of its target, behind it, or put into a weight.

A hook looks its delta module up from the module that is called, by path and key: so it stays right in a deepcopy, in a
pickle and in the replicas of `nn.DataParallel`, which share one table of hooks.
"""

from typing import Any

from torch import nn


class Ahead:
    """Calls the delta modules of a target ahead of it, one after the other: one hook, however many there are."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.delta_keys = keys
        self.handle: Any = None

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = False
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is None or not delta.live or not delta.takes_part:
                continue
            new = delta.before(target, args, kwargs)
            if new is not None:
                (args, kwargs), changed = new, True
        return (args, kwargs) if changed else None


class Behind(Ahead):
    """Calls the delta modules of a target behind it, each with what the one before it made of the output."""

    def __init__(self, keys: tuple[str, ...], *, always: bool) -> None:
        super().__init__(keys)
        self.always = always
        self.fired = False

    def __call__(  # type: ignore[override]
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self.fired = True
        try:
            return self._through(target, args, kwargs, output)
        except BaseException:
            # Torch has called this hook: what must always be called would be left out.
            if self.always and output is not None:
                self._through(target, args, kwargs, None)
            raise

    def _through(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # In every call of every target: nothing is asked twice here.
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is None:
                continue
            # Behind a forward that raised, torch calls with no output what is always called.
            if output is None and self.always and not delta.always_after:
                continue
            record = delta.record
            if record is not None and (not record.active or record.merged):
                continue
            if record is None or record.batch is None:
                new = delta.after(target, args, kwargs, output)
            else:
                first = record.batch.first.get(target)
                if first is not None and first is not delta:
                    continue
                new = delta.after_rows(target, args, kwargs, output, record.batch)
            if new is not None:
                output = new
        return output


def ours(module: nn.Module, kind: type[Any]) -> list[Any]:
    tables = (module._forward_pre_hooks, module._forward_hooks)
    return [hook for table in tables for hook in table.values() if isinstance(hook, kind)]
