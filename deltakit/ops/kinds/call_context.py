"""Call contexts: something is opened ahead of a call of the target and closed behind it."""

from typing import Any, ClassVar

from torch import nn

from deltakit.core import DeltaModule


class CallContext(DeltaModule):
    """Acts around the calls of its target. The author writes `enter`, `leave` or both, and `abandon` if it must clean up.

    Where several deltas of one class stand on a target, only the first of those that take part in a call is asked, and
    acts for all `peers`.
    """

    scalable: ClassVar[bool] = False
    mixable: ClassVar[bool] = False
    """A context that serves a mixed batch, whose `peers` are different deltas, sets this to True."""
    must_be_called: ClassVar[bool] = False

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """None, or the (args, kwargs) that the target is called with instead."""
        return None

    def leave(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the target returns instead of `output`."""
        return output

    def peers(self, target: nn.Module) -> list[Any]:
        """The delta modules of its class on a target that take part in a call, in the order of attachment."""
        there = [child for child in target._modules.values() if type(child) is type(self)]
        found = [child for child in there if isinstance(child, DeltaModule) and child.live and child.takes_part]
        return sorted(found, key=lambda child: child.record.order if child.record is not None else 0)

    def _leads(self, target: nn.Module) -> bool:
        return next(iter(self.peers(target)), None) is self

    @classmethod
    def acts_before(cls) -> bool:
        return cls.enter is not CallContext.enter

    @classmethod
    def acts_after(cls) -> bool:
        return cls.leave is not CallContext.leave

    def before_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.enter(target, args, kwargs) if self._leads(target) else None

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.leave(target, args, kwargs, output) if self._leads(target) else None
