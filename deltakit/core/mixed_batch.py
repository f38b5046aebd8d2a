"""A mixed-adapter batch, in which each example has its own delta: `with rows(model, ["spelling", None, "facts"]):`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from deltakit.errors import StateError


@dataclass(eq=False)
class MixedBatch:
    """The name of each example's delta, or None for no delta. All deltas of a backbone share it inside a `rows` block.

    `known` are the names of all deltas of the backbone, and `owners` has for each example the index of its delta among them,
    or -1. Compiled code reads these and not `names`: a tensor may have other values in the same graph. `kept` caches what
    methods compute for these names, such as gathered factors.
    """

    names: tuple[str | None, ...]
    known: tuple[str, ...]
    owners: Int64[Tensor, " examples"]
    kept: dict[Any, Any] = field(default_factory=dict)
    first: dict[tuple[nn.Module, bool], nn.Module] = field(default_factory=dict)
    """By target and mode (training or not): the delta module that computes the output for all deltas there."""
    open: bool = True
    """Whether its `rows` block has not ended."""
    running: list[int] = field(default_factory=list)
    """The threads in which a forward of the whole backbone runs with it."""

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
            made = torch.tensor(rows, dtype=torch.int64, device=x.device)
            if not torch.compiler.is_compiling() and made.is_inference():
                # The next call in the same block may be a training step, which cannot save such a tensor.
                return made
            self.kept[key] = made
        found: Tensor = self.kept[key]
        return found

    def times(self, x: Shaped[Tensor, "*shape"], module: nn.Module) -> int:
        """Returns how many rows of a tensor belong to each example of the batch.

        Raises:
            StateError: if the number of rows is not a multiple of the number of examples.
        """
        # Not `divmod`, which dynamo cannot trace with sizes that are dynamic.
        count = self.owners.shape[0]
        times, rest = x.shape[0] // count, x.shape[0] % count
        # In two dimensions the rows may be the tokens of all examples: a multiple of their number shows nothing.
        if rest or (x.ndim < 3 and times != 1):
            raise StateError(
                f"{type(module).__name__}: rows() has {len(self.names)} names, so a tensor [examples, length, d] must have "
                f"that many examples or a multiple of it; found shape {tuple(x.shape)}; give one name for each example, and "
                "leave targets that mix the examples (experts) out with exclude="
            )
        return times
