"""Call contexts: they act before and after each call of the target."""

from typing import Any, ClassVar

from torch import nn

from deltakit.core import DeltaModule, Design


class CallContext(DeltaModule):
    """Acts before and after the calls of its target. The author writes `enter`, `leave` or both.

    If `leave` must clean up what `enter` did, the author also writes `abandon`, which is called when the target's forward
    raised. If several deltas of one class are on a target, only the first active one is called, and acts for all `peers`.
    """

    design: ClassVar[Design] = Design(
        form="f(call)", changes="input and output", insertion="sequential", composition="replacement"
    )
    scalable: ClassVar[bool] = False
    mixable: ClassVar[bool] = False
    """A context that supports mixed batches, in which its `peers` belong to different examples, sets this to True."""
    must_be_called = False

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the (args, kwargs) to call the target with, or None to keep them."""
        return None

    def leave(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the target's new output, or None to keep `output`."""
        return output

    def peers(self, target: nn.Module) -> list[Any]:
        """Returns the active delta modules of its class on a target, in the order of attachment, itself included."""
        there: list[DeltaModule] = [child for child in list(target._modules.values()) if type(child) is type(self)]
        if self not in there:
            # Another thread detaches it while the target is called.
            there.append(self)
        found = [child for child in there if child.live and child.takes_part]
        return sorted(found, key=lambda child: child.record.order if child.record is not None else 0)

    def _leads(self, target: nn.Module) -> bool:
        # Not by `next` with a default, which torch 2.6 cannot trace.
        peers = self.peers(target)
        return len(peers) > 0 and peers[0] is self

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
