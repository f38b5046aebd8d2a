"""Which rows of a batch belong to which delta: `with rows(model, ["spelling", None, "facts"]):`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltakit.errors import OptionError, StateError, no_such_delta


@dataclass(eq=False)
class MixedBatch:
    """The name of each row's delta, or None. The deltas of one backbone share it while it holds.

    `kept`: what methods computed for this composition and may use again, by the module that it is for.
    """

    names: tuple[str | None, ...]
    kept: dict[Any, Any] = field(default_factory=dict)
    first: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """Where the first delta module at a target does the work of all that stand there."""

    def of(self, name: str, x: Tensor, module: nn.Module) -> Int64[Tensor, " rows"]:
        """The rows of a tensor that belong to a delta. A row of the batch may be several there: beams follow each other."""
        times = self.times(x, module)
        key = (name, times, x.device)
        if key not in self.kept:
            rows = [i * times + k for i, own in enumerate(self.names) if own == name for k in range(times)]
            self.kept[key] = torch.tensor(rows, dtype=torch.int64, device=x.device)
        found: Tensor = self.kept[key]
        return found

    def times(self, x: Tensor, module: nn.Module) -> int:
        """How many rows of a tensor belong to each row of the batch.

        Raises:
            StateError: if that cannot be told.
        """
        times, rest = divmod(x.shape[0], len(self.names))
        if rest or (x.ndim < 3 and times != 1):
            raise StateError(
                f"{type(module).__name__}: expected {len(self.names)} rows as rows() was given names, or a multiple of that "
                f"in tensors [rows, length, d]; found shape {tuple(x.shape)}; name each row of the batch, and leave "
                "targets whose rows are mixed (experts) out with exclude="
            )
        return times


@contextmanager
def holding(records: Sequence[Any], names: Sequence[str | None]) -> Iterator[MixedBatch]:
    """Lets the rows of batches belong to these deltas for the time of a `with` block.

    Raises:
        OptionError: if a name is unknown, or no name is given.
        StateError: if another block holds already, or a delta that is named is switched off or merged.
    """
    known = {record.name: record for record in records}
    if isinstance(names, str) or not len(names):
        raise OptionError(f"rows(..., {names!r}): expected a list with the name of a delta, or None, for each row")
    for name in dict.fromkeys(names):
        if name is None:
            continue
        if name not in known:
            raise no_such_delta("rows", name, known)
        if not known[name].active or known[name].merged:
            raise StateError(
                f"rows: delta {name!r} is {'merged' if known[name].merged else 'not active'}; change that first"
            )
    if any(record.batch is not None for record in records):
        raise StateError("rows: another rows() block holds on this backbone; leave it first")
    batch = MixedBatch(tuple(names))
    for record in records:
        record.batch = batch
    try:
        yield batch
    finally:
        for record in records:
            record.batch = None
