"""Mixed-adapter batches, in which each example has its own delta: `with rows(model, ["spelling", None, "facts"]):`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from deltakit.errors import OptionError, StateError, no_such_delta


@dataclass(eq=False)
class MixedBatch:
    """The name of each example's delta, or None for no delta. All deltas of a backbone share it inside a `rows` block.

    `kept` caches what methods compute for these names, such as gathered factors.
    """

    names: tuple[str | None, ...]
    kept: dict[Any, Any] = field(default_factory=dict)
    first: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """By target: the delta module that computes the output for all deltas there."""

    def of(self, name: str, x: Shaped[Tensor, "*shape"], module: nn.Module) -> Int64[Tensor, " rows"]:
        """Returns the indices of a tensor's rows that belong to a delta.

        Beam search turns one example into several consecutive rows, which all belong to its delta.

        Args:
            module: the target, for the error message.

        Raises:
            StateError: if the number of rows is not a multiple of the number of examples.
        """
        times = self.times(x, module)
        key = (name, times, x.device)
        if key not in self.kept:
            rows = [i * times + k for i, own in enumerate(self.names) if own == name for k in range(times)]
            self.kept[key] = torch.tensor(rows, dtype=torch.int64, device=x.device)
        found: Tensor = self.kept[key]
        return found

    def times(self, x: Shaped[Tensor, "*shape"], module: nn.Module) -> int:
        """Returns how many rows of a tensor belong to each example of the batch.

        Raises:
            StateError: if the number of rows is not a multiple of the number of examples.
        """
        times, rest = divmod(x.shape[0], len(self.names))
        # In two dimensions the rows may be the tokens of all examples: a multiple of their number shows nothing.
        if rest or (x.ndim < 3 and times != 1):
            raise StateError(
                f"{type(module).__name__}: rows() has {len(self.names)} names, so a tensor [examples, length, d] must have "
                f"that many examples or a multiple of it; found shape {tuple(x.shape)}; give one name for each example, and "
                "leave targets that mix the examples (experts) out with exclude="
            )
        return times


@contextmanager
def holding(records: Sequence[Any], names: Sequence[str | None]) -> Iterator[MixedBatch]:
    """Sets the mixed batch of these records inside a `with` block.

    Args:
        records: the records of all deltas on one backbone.
        names: for each example the name of its delta, or None.

    Raises:
        OptionError: if a name is unknown, or no name is given.
        StateError: if the backbone is in another `rows` block, or a named delta is not active or is merged.
    """
    known = {record.name: record for record in records}
    if isinstance(names, str) or not len(names):
        raise OptionError(f"rows(..., {names!r}): expected a list with the name of a delta, or None, for each example")
    for name in dict.fromkeys(names):
        if name is None:
            continue
        if name not in known:
            raise no_such_delta("rows", name, known)
        if not known[name].active or known[name].merged:
            found = "merged; unmerge() it" if known[name].merged else "not active; set its active = True"
            raise StateError(f"rows: delta {name!r} is {found} first")
    if any(record.batch is not None for record in records):
        raise StateError("rows: this backbone is in another rows() block already; leave that block first")
    batch = MixedBatch(tuple(names))
    for record in records:
        record.batch = batch
    try:
        yield batch
    finally:
        for record in records:
            record.batch = None
