"""AttachedModule: what hooks, merging and files ask of a delta module.

The kinds in `deltakit.ops` implement it. A method author derives from a kind and meets `core.delta_module` at most.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from deltakit.core.activations import hidden_output
from deltakit.core.caller_rows import RowsState, rows_now
from deltakit.core.mixed_batch import MixedBatch
from deltakit.core.target import Target, WeightRead
from deltakit.core.target_hooks import OutputHook
from deltakit.core.without_deltas import deltas_left_out
from deltakit.errors import TargetError

FROZEN = "frozen"
"""The tag of parameters that are saved with a delta but never trained."""
HELD = "_deltakit_held"
"""The attribute in which the first delta module of a target keeps what is known of all of them (`core.held`)."""
TRAINING = "training"
"""The tag of buffers that a training run needs to continue, such as moving averages. Checkpoints have them, files do not."""


@runtime_checkable
class DeltaState(RowsState, Protocol):
    """The part of a delta's state (`core.record.Record`) that its delta modules read."""

    name: str
    named: bool
    order: int
    active: bool
    compiled: bool
    scale: float
    weights_before_merge: dict[str, Tensor]
    leaving: bool

    @property
    def live(self) -> bool: ...


class FirstSizes(NamedTuple):
    """Sizes when a delta module was first attached.

    `parameters`: the shapes of its parameters. Engines may later keep only a part of them per process. `target`: the sizes of
    its target, if that is a linear layer or an embedding.
    """

    parameters: Mapping[str, torch.Size]
    target: tuple[int, int] | None


class AttachedModule(nn.Module):
    """A module at one target, registered there as a child."""

    tags: ClassVar[Mapping[str, str]] = {}
    """A tag for each parameter (see `DeltaModule.tags`)."""

    # The kinds set the next six.
    scalable: ClassVar[bool] = True
    """Whether `Delta.scale` applies."""
    mixable: ClassVar[bool] = True
    """Whether examples of one batch may have different deltas here (`rows`)."""
    weighable: ClassVar[bool] = False
    """Whether a `Weighing` may ask for its `contribution`: what it computes from one call of its target, and nothing else."""
    has_weight_form: ClassVar[bool] = False
    """Whether its method can patch a weight that is read directly."""
    reads_weight: ClassVar[bool] = False
    """Whether its update depends on the target's weight."""
    output_hook: ClassVar[type[OutputHook]] = OutputHook
    """The class of the hook that calls it after its target."""

    # Kinds or methods set the next one.
    must_be_called: bool = True
    """Whether the first forward must call the target, and fails otherwise."""

    # Building and attaching set the next five.
    part: str = ""
    """The name of the parameter and the feature slice in brackets within the target's module, or "" for the module."""
    weight_read: WeightRead | None = None
    """Set for weight patches: during the forward of that scope the update is added to the weight."""
    covers_ties: bool = False
    """Whether its method has a delta module at each module that shares the target's weight, so that merging changes all."""
    record: DeltaState | None = None
    """The state of its delta, shared by all modules of the delta."""
    first_sizes: FirstSizes | None = None
    """The sizes when it was first attached."""

    def __init__(self) -> None:
        super().__init__()
        # CPython keeps the names of attributes once for all instances of a class, up to 29 names, if each gets them in one
        # order and none gets more when others are there already. A delta module is then 1.3 kB smaller (measured on 3.11),
        # which a decoding step would read at each target. So what is set later has its place from the start. Few have
        # a `weight_read` or `covers_ties`.
        own = self.__dict__
        own["record"] = own["first_sizes"] = own[HELD] = None
        own["part"] = ""

    @classmethod
    def word(cls) -> str:
        """Returns its name in error messages: the name of its class without "Delta"."""
        return cls.__name__.removesuffix("Delta")

    def share(self, shared: nn.Module, *, holds: bool) -> None:
        """Gives it access to the shared module.

        Args:
            holds: whether to register the shared module as a child. One delta module does, so that the shared parameters
                are counted, moved and saved once.
        """
        self.__dict__["_shared"] = (shared,)
        if holds:
            self._modules["shared"] = shared

    def parameters_read(self) -> list[Tensor]:
        """The parameters that it computes with: its own, and those of what all share."""
        # Most delta modules are flat, and `parameters()` is slow: mixed batches ask each of them in each call.
        own = self.parameters() if self._modules else self._parameters.values()
        found: list[Tensor] = [parameter for parameter in own if parameter is not None]
        shared = self.__dict__.get("_shared")
        return found if shared is None or "shared" in self._modules else [*found, *shared[0].parameters()]

    @property
    def target_never_called(self) -> bool:
        """Whether its target is certain not to be called: the module around it reads the weight directly."""
        return self.weight_read is not None and self.weight_read.never_called

    @property
    def strength(self) -> float:
        """The factor on its effect: `Delta.scale`, or 1 while it belongs to no delta."""
        return 1.0 if self.record is None else self.record.scale

    @property
    def live(self) -> bool:
        """Whether its delta takes part in forwards: active, and not merged into the weights."""
        return self.record is None or self.record.live

    @property
    def batch(self) -> MixedBatch | None:
        """The mixed batch of the caller's `rows` block; None outside of one."""
        record = self.record
        return rows_now(record, self) if record is not None and record.has_rows else None

    @property
    def takes_part(self) -> bool:
        """Whether any example of the batch uses its delta; always true outside of a `rows` block."""
        batch = self.batch
        return batch is None or (self.record is not None and self.record.name in batch.names)

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        """Returns whether it patches a target's weight, instead of changing the module's input or output."""
        return False

    @classmethod
    def acts_before(cls) -> bool:
        """Returns whether a hook must call it before its target."""
        return cls.before_call is not AttachedModule.before_call

    @classmethod
    def acts_after(cls) -> bool:
        """Returns whether a hook must call it after its target."""
        return cls.after_call is not AttachedModule.after_call

    @classmethod
    def cleans_up(cls) -> bool:
        """Returns whether a hook must call `abandon` when the forward of its target raises."""
        return cls.abandon is not AttachedModule.abandon

    def before_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the (args, kwargs) to call the target with, or None to keep them."""
        return None

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the target's new output, or None to keep `output`."""
        return output

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        """Does the same as `after_call`, inside a `rows` block."""
        return self.after_call(target, args, kwargs, output)

    def contribution(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """Returns what it adds to an output y of its target, in y's shape. y stays as it is, and the delta need not be active.

        Kinds that change outputs in place, or that ask which of the deltas come before them, override it.
        """
        return hidden_output(self.after_call(target, args, kwargs, y)) - y

    def abandon(self, target: nn.Module) -> None:
        """Cleans up. It is called instead of `after_call` when the target's forward raised."""

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        """Returns what merging adds to each parameter of the target, by the parameter's name, in float32 or wider.

        Raises:
            TargetError: if the method does not change weights, so that it cannot be merged.
            StateError: if a weight that the update depends on has no values in memory (meta device, offload).
        """
        self.refuse_merging()

    def refuse_merging(self) -> NoReturn:
        """Raises the error of a delta module that does not change weights.

        Raises:
            TargetError: always.
        """
        raise TargetError(
            f"{type(self).__name__} does not change weights, so it cannot be merged; leave the delta attached"
        )

    def scaled_updates(self, target: nn.Module) -> dict[str, Tensor]:
        """Returns `weight_updates` times the current scale of the delta.

        Raises:
            TargetError: if the method does not change weights, so that it cannot be merged.
            StateError: if a weight that the update depends on has no values in memory (meta device, offload).
        """
        updates, strength = self.weight_updates(target), self.strength
        return {name: value if strength == 1 else value * strength for name, value in updates.items()}

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter, str]]:
        """Yields its trained parameters: name, parameter, and tag ("" without one)."""
        flat = {name: p for name, p in self._parameters.items() if p is not None} if not self._modules else {}
        # Most delta modules are flat, and `named_parameters` takes ten times as long. It yields a tied parameter once.
        own = flat.items() if flat and len(set(map(id, flat.values()))) == len(flat) else self.named_parameters()
        for name, parameter in own:
            tag = self.tag_of(name)
            if tag != FROZEN:
                yield name, parameter, tag

    def tag_of(self, name: str) -> str:
        """Returns the tag of a parameter; "" without one."""
        return self.tags.get(name) or self.tags.get(name.partition(".")[0], "")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns its state dict, which is part of the backbone's unless deltas are left out of that."""
        if not deltas_left_out():
            return super().state_dict(*args, **kwargs)
        found = kwargs.get("destination", args[0] if args else None)
        return {} if found is None else found

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # A base checkpoint must load with strict=True while deltas are attached. If it has no tensors of this delta module,
        # the module keeps its values. `injection.backbone_guards` reports checkpoints that hold only a part of a delta.
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *args)
