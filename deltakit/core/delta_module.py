"""The small modules that methods put at their targets."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltakit.core.activations import hidden_input, hidden_output, replace_hidden
from deltakit.core.target import WeightRead
from deltakit.errors import TargetError


class DeltaModule(nn.Module):
    """The small module that a method puts at one target, registered there as a child.

    `forward(x, y)` takes what the target was given and what it returned, and gives what it shall return instead.
    A method that needs more overrides `before` (called ahead of the target) or `after` (called behind it).
    """

    always_after: ClassVar[bool] = False
    """Whether `after` runs even when the target's forward raises (to close what `before` opened)."""

    part: str = ""
    """What of the module it stands on: nothing for the module, a parameter's name, and rows in brackets."""

    weight_read: WeightRead | None = None
    """Set where it works by the weight: during the forward at that scope the weight has the update added."""

    record: Any = None
    """The state of the delta that this module belongs to (`deltakit.delta.Record`), shared by all its modules."""

    @property
    def live(self) -> bool:
        """Whether the delta takes part in forwards: active, and not merged into the weights."""
        return self.record is None or (self.record.active and not self.record.merged)

    shapes: Mapping[str, torch.Size] | None = None
    """The shapes of its parameters as it was attached: an engine may keep only a part of them in a process."""

    scales: ClassVar[bool | None] = None
    """Whether its effect can be scaled (`Delta.scale`); None: if it overrides `forward` alone, or works by the weight."""

    @property
    def strength(self) -> float:
        """How much of its effect the delta has: `Delta.scale`."""
        return 1.0 if self.record is None else float(self.record.scale)

    by_rows: ClassVar[bool | None] = None
    """Whether rows of a batch may each have their own delta (`rows`); None: if it only acts behind its target."""

    @property
    def takes_part(self) -> bool:
        """Whether any row of the batch belongs to the delta; always, unless `rows` says otherwise."""
        batch = self.record.batch if self.record is not None else None
        return batch is None or self.record.name in batch.names

    def after_rows(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: Any
    ) -> Any:
        """What the target shall return where only some rows of the batch belong to this delta."""
        if not self.takes_part:
            return None
        y = hidden_output(output)
        rows = batch.of(self.record.name, y, target)
        if len(rows) == y.shape[0]:
            return self.after(target, args, kwargs, output)
        x = hidden_input(args, kwargs)
        part = self.after(target, (x.index_select(0, rows),), {}, y.index_select(0, rows))
        return replace_hidden(output, y.index_copy(0, rows, part))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the target shall return for the input x instead of y, which must stay as it is."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither forward nor after")

    def before(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """None, or the (args, kwargs) that the target shall be called with instead."""
        return None

    def after(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the target shall return instead of `output`."""
        y = hidden_output(output)
        new = self(hidden_input(args, kwargs), y)
        return replace_hidden(output, new if self.strength == 1 else torch.lerp(y, new, self.strength))

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        """What merging adds to each parameter of the target, by the parameter's name, in float32 or wider.

        Raises:
            TargetError: if the method is no change of weights.
        """
        raise TargetError(f"{type(self).__name__} is not a change of weights: it cannot be merged; leave it attached")

    def scaled_update(self, target: nn.Module) -> dict[str, Tensor]:
        """`weight_update` at the strength that the delta has now."""
        update = self.weight_update(target)
        return {name: value if self.strength == 1 else value * self.strength for name, value in update.items()}

    def take_sum(self, parts: Sequence[tuple[float, "DeltaModule"]]) -> tuple[float, float]:
        """Takes the values of a weighted sum of delta modules at one place; the squared norms of what is lost, and of all.

        Raises:
            TargetError: if no delta module of this kind is such a sum.
        """
        raise TargetError(
            f"{type(self).__name__} is not linear in its parameters: a weighted sum of several is none; run them one by one"
        )

    def saved_state(self) -> dict[str, Tensor]:
        """The tensors that a file holds for this target, by the method's own parameter names."""
        return dict(self.state_dict())

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        """Takes over tensors that `saved_state` gave, of exactly these names and shapes."""
        self.load_state_dict(dict(state))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # A base checkpoint must load strictly while deltas are attached: where it holds nothing of this delta module,
        # the module keeps what it has. That a checkpoint holds only a part of a delta is reported by `hooks.ReportPart`.
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def summary(self) -> str:
        """The configuration in a few words for trees and reports, such as `r=8 alpha=16`."""
        return ""


def can_scale(delta: DeltaModule) -> bool:
    """Whether the effect of a delta module can be scaled: what it adds to an output, or to a weight."""
    kind = type(delta)
    added = kind.after is DeltaModule.after and kind.forward is not DeltaModule.forward
    return delta.weight_read is not None or (added if kind.scales is None else kind.scales)
