"""`deltas` finds the deltas of a backbone, and `use` makes exactly some of them active."""

from types import TracebackType

from torch import nn

from deltakit.core import attachments_of, checked
from deltakit.delta.handle import Delta
from deltakit.errors import OptionError, no_such_delta


class Used:
    """The deltas that `use` made active. As a context manager it restores the earlier choice at the end of the block."""

    def __init__(self, before: dict[Delta, bool], names: tuple[str, ...]) -> None:
        self._before = before
        self.names = names

    def __enter__(self) -> "Used":
        # Again, for an object that is kept and entered twice.
        now = {delta: delta.active for delta in self._before if delta.attached}
        if now != {delta: delta.name in self.names for delta in now}:
            self._before = now
            _set({delta: delta.name in self.names for delta in now})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set({delta: active for delta, active in self._before.items() if delta.attached})

    def __repr__(self) -> str:
        return f"in use: {', '.join(self.names) or 'no delta'}"


@checked
def use(backbone: nn.Module, *names: str | None) -> Used:
    """Makes exactly the deltas with these names active; `use(model, None)` makes none of them active.

    It holds until it is changed. In a `with` statement the earlier choice comes back at the end of the block.

    Args:
        names: the names of attached deltas; None stands for no delta.

    Raises:
        OptionError: if there is no attached delta of a name.
        StateError: if a delta whose state would change is merged, or the backbone is in a `rows` block. Nothing is changed
            then.
    """
    there = deltas(backbone)
    wanted = tuple(dict.fromkeys(name for name in names if name is not None))
    unknown = [name for name in wanted if name not in {delta.name for delta in there}]
    if unknown:
        raise no_such_delta("use", unknown[0], [delta.name for delta in there])
    if not names:
        raise OptionError("use: no name was given; pass the names of attached deltas, or None for the bare backbone")
    before = {delta: delta.active for delta in there}
    _set({delta: delta.name in wanted for delta in there})
    return Used(before, wanted)


def _set(wanted: dict[Delta, bool]) -> None:
    """Sets which deltas are active: all of them, or none."""
    before = {delta: delta.active for delta in wanted}
    try:
        # First those that leave: two may train the same part of the backbone.
        for delta, active in sorted(wanted.items(), key=lambda entry: entry[1]):
            delta.active = active
    except BaseException:
        for delta, active in sorted(before.items(), key=lambda entry: entry[1]):
            delta.active = active
        raise


@checked
def deltas(backbone: nn.Module) -> list[Delta]:
    """Returns the deltas attached to a backbone or to parts of it, in their order.

    A deepcopy or an unpickled backbone has its own.

    Raises:
        TargetError: if the backbone is no module.
    """
    return [Delta(attachment) for attachment in attachments_of(backbone)]
