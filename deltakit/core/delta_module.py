"""The base of the small modules that methods put at their targets.

A method author derives from one of the kinds in `deltakit.ops` (OutputMap, InputMap, LowRank, WeightMap, CallContext), not
from this class: a kind defines what hooks call here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from deltakit.core.mixed_batch import MixedBatch
from deltakit.core.target import Target, WeightRead
from deltakit.errors import TargetError

FROZEN = "frozen"
"""The tag of parameters that are saved with a delta and never trained."""


@runtime_checkable
class DeltaState(Protocol):
    """What delta modules read of the delta that they belong to (`core.record.Record`)."""

    name: str
    named: bool
    order: int
    scale: float
    batch: MixedBatch | None
    weights_before_merge: dict[str, Tensor]

    @property
    def live(self) -> bool: ...


class DeltaModule(nn.Module):
    """A small module at one target, registered there as a child."""

    tags: ClassVar[Mapping[str, str]] = {}
    """A tag for each parameter, by its name or that of the child that holds it: `Delta.parameter_groups` groups by them, and
    what is tagged "frozen" is never trained."""

    # The next five are set by the kinds.
    scalable: ClassVar[bool] = True
    """Whether `Delta.scale` applies."""
    mixable: ClassVar[bool] = True
    """Whether examples of one batch may have different deltas here (`rows`)."""
    must_be_called: ClassVar[bool] = True
    """Whether a first forward that never calls the target is an error."""
    has_weight_form: ClassVar[bool] = False
    """Whether its method can patch a weight that is read directly."""
    reads_call: ClassVar[bool] = False
    """Whether it reads `current_call()`: the ids, mask and position of the backbone's call."""

    # The next four are set when it is built and attached.
    part: str = ""
    """What of its target's module it stands for: "" for the module, a parameter's name, and a feature slice in brackets."""
    weight_read: WeightRead | None = None
    """Set where it patches a weight: during the forward at that scope the weight has the update added."""
    record: DeltaState | None = None
    """The state of its delta, shared by all the delta's modules."""
    shapes: Mapping[str, torch.Size] | None = None
    """The shapes of its parameters as it was attached: an engine may keep only a part of them in a process."""

    @classmethod
    def word(cls) -> str:
        """What errors call it: its class without "Delta"."""
        return cls.__name__.removesuffix("Delta")

    @property
    def shared(self) -> Any:
        """What all delta modules of the method share (`Method.build_shared`); None without it."""
        return self.__dict__.get("_shared", (None,))[0]

    def share(self, shared: nn.Module, *, holds: bool) -> None:
        """Lets it refer to what all share. The one that holds it registers it: so it is counted, moved and saved once."""
        self.__dict__["_shared"] = (shared,)
        if holds:
            self._modules["shared"] = shared

    def parameters_read(self) -> list[Tensor]:
        """The parameters that it computes with: its own, and those of what all share."""
        own: list[Tensor] = list(self.parameters())
        shared = self.shared
        return own if shared is None or "shared" in self._modules else [*own, *shared.parameters()]

    @property
    def strength(self) -> float:
        """How much of its effect it has: `Delta.scale`."""
        return 1.0 if self.record is None else self.record.scale

    @property
    def live(self) -> bool:
        """Whether its delta takes part in forwards: active, and not merged into the weights."""
        return self.record is None or self.record.live

    @property
    def batch(self) -> MixedBatch | None:
        """The mixed batch of the `rows` block that the backbone is in; None outside."""
        return self.record.batch if self.record is not None else None

    @property
    def takes_part(self) -> bool:
        """Whether any example of the batch belongs to its delta; always, unless `rows` says otherwise."""
        batch = self.batch
        return batch is None or (self.record is not None and self.record.name in batch.names)

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        """Whether it serves a target by a weight patch instead of by the module's input or output."""
        return False

    @classmethod
    def acts_before(cls) -> bool:
        """Whether a hook must call it ahead of its target."""
        return cls.before_call is not DeltaModule.before_call

    @classmethod
    def acts_after(cls) -> bool:
        """Whether a hook must call it behind its target."""
        return cls.after_call is not DeltaModule.after_call

    @classmethod
    def cleans_up(cls) -> bool:
        """Whether it must be told that the forward of its target raised."""
        return cls.abandon is not DeltaModule.abandon

    def before_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """None, or the (args, kwargs) that the target is called with instead."""
        return None

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the target returns instead of `output`; None for the output as it is."""
        return output

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        """`after_call` inside a `rows` block."""
        return self.after_call(target, args, kwargs, output)

    def abandon(self, target: nn.Module) -> None:
        """Called instead of `after_call` when the target's forward raised."""

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        """What merging adds to each parameter of the target, by the parameter's name, in float32 or wider.

        Raises:
            TargetError: if the method is no change of weights.
        """
        raise TargetError(f"{type(self).__name__} is not a change of weights: it cannot be merged; leave it attached")

    def scaled_updates(self, target: nn.Module) -> dict[str, Tensor]:
        """`weight_updates` times the scale that the delta has now."""
        updates, strength = self.weight_updates(target), self.strength
        return {name: value if strength == 1 else value * strength for name, value in updates.items()}

    def take_sum(self, parts: Sequence[tuple[float, "DeltaModule"]]) -> tuple[float, float]:
        """Takes the values of a weighted sum of delta modules at one target.

        Returns:
            The squared truncation error, and the squared norm of the sum.

        Raises:
            TargetError: if no delta module of this kind is such a sum.
        """
        raise TargetError(
            f"{type(self).__name__} is not linear in its parameters: no weighted sum of several exists; run them one by one"
        )

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter, str]]:
        """Its parameters that training changes: name, parameter, and tag ("" without one)."""
        for name, parameter in self.named_parameters():
            tag = self.tag_of(name)
            if tag != FROZEN:
                yield name, parameter, tag

    def tag_of(self, name: str) -> str:
        """The tag of a parameter; "" without one."""
        return self.tags.get(name) or self.tags.get(name.partition(".")[0], "")

    def saved_state(self) -> dict[str, Tensor]:
        """The tensors that a file holds for this target, by the method's own names."""
        return dict(self.state_dict())

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        """Loads tensors that `saved_state` gave, of exactly these names and shapes."""
        self.load_state_dict(dict(state))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # A base checkpoint must load strictly while deltas are attached: where it holds nothing of this delta module, the
        # module keeps what it has. `injection.backbone_guards` reports a checkpoint that holds only a part of a delta.
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def summary(self) -> str:
        """The configuration in a few words for trees and reports, such as `r=8 alpha=16`."""
        return ""
