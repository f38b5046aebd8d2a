"""What a method is: a frozen dataclass of options that builds one delta module for each of its targets.

A new method is one file in `deltakit/methods/`: a `Method` subclass with a name, and the `DeltaModule` it builds.
Nothing else is edited; matching, attaching, saving, drawing and the contract tests find it by its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltakit.activations import hidden_input, hidden_output, replace_hidden
from deltakit.errors import CheckpointError, TargetError
from deltakit.rows import Rows
from deltakit.selectors import type_names

METHODS: dict[str, type["Method"]] = {}
"""Every method by its name; filled as their classes are defined."""

Selector = str | Sequence[str]


@dataclass(frozen=True)
class Reading:
    """Where a weight is read: the module at `scope` uses its values in its forward.

    `holder` is the path below the scope of the module that holds it, by `name` if that is not the target's own. `also` are
    further places where it is read: by the other modules that hold it (tied weights), or by the holder itself.
    `never_called`: the holder is sure not to be called as a module.
    """

    scope: str
    holder: str
    name: str = ""
    also: tuple["Reading", ...] = ()
    never_called: bool = False

    @property
    def owner(self) -> str:
        """The path of the holder in the backbone."""
        return ".".join(filter(None, (self.scope, self.holder)))


@dataclass(frozen=True)
class Target:
    """What a selector picked: a module, a parameter of one, or the rows of a fused projection.

    Its path; the module that it is, or that holds it; and other paths under which the same instance is registered.
    `width` is the size of the hidden states in the block around it, in elements, where the structure tells. `reading`
    says where its weight is read without the module being called, `tied` under which other names it is held. `around` is
    the dtype of the nearest parameters around it that are in floating point.
    """

    path: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    width: int | None = None
    parameter: str = ""
    rows: Rows | None = None
    reading: Reading | None = None
    tied: tuple[str, ...] = ()
    around: torch.dtype | None = None


class DeltaModule(nn.Module):
    """The small module that a method puts at one target, registered there as a child.

    `forward(x, y)` takes what the target was given and what it returned, and gives what it shall return instead.
    A method that needs more overrides `before` (called ahead of the target) or `after` (called behind it).
    """

    always_after: ClassVar[bool] = False
    """Whether `after` runs even when the target's forward raises (to close what `before` opened)."""

    place: str = ""
    """What of the module it stands on: nothing for the module, a parameter's name, and rows in brackets."""

    reading: Reading | None = None
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
    return delta.reading is not None or (added if kind.scales is None else kind.scales)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What to attach and where. `at`: selectors, by default the positions of the method's paper.

    `of` narrows the targets to modules of a type (a class, or its name), `exclude` takes selectors out again.
    """

    at: Selector | None = None
    of: type[nn.Module] | str | Sequence[type[nn.Module] | str] | None = None
    exclude: Selector | None = None

    name: ClassVar[str]
    default_at: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Default positions as roles. Of each inner tuple the first role that a unit (one attention or one
    feed-forward part) has is taken in that unit."""

    default_words: ClassVar[str] = "its own positions"
    """What a method without default roles stands on, in the words of an error."""

    weights: ClassVar[bool] = False
    """Whether its delta modules have a weight form (`weight_update`), which works where a weight is read and its module
    is not called."""

    identity: ClassVar[bool] = True
    """Whether attached and untrained is bit for bit the backbone alone."""

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            METHODS[name] = cls

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", type_names(self.of))
        for option in ("at", "exclude"):
            value = getattr(self, option)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, option, tuple(value))
        self.validate()

    def validate(self) -> None:
        """Raises `OptionError` if an option is out of its range. Overridden by each method with options."""

    @property
    def default_roles(self) -> tuple[tuple[str, ...], ...]:
        """The default positions with these options; `default_at` unless an option changes them."""
        return self.default_at

    def default_targets(self, backbone: nn.Module) -> Sequence[str] | None:
        """The default paths where roles cannot say them; None to use `default_at`."""
        return None

    def place(self, backbone: nn.Module, selected: Sequence[Target]) -> Sequence[Target]:
        """The modules that get a delta module when `selected` were picked; by default the same."""
        return selected

    def serves(self, target: Target) -> bool:
        """Whether a default position that was found is one for this method; what is not, the plan says."""
        return self.weights or not (target.parameter or (target.reading and target.reading.never_called))

    def by_weight(self, target: Target) -> bool:
        """Whether the delta module at a target works by the weight instead of by the output."""
        return self.weights and target.reading is not None

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        """One delta module for each target's path. All targets are given, so that they may share parameters."""
        return {target.path: self.build_at(target) for target in targets}

    def build_at(self, target: Target) -> DeltaModule:
        """The delta module for one target, on its device and in its dtype.

        Raises:
            TargetError: if the method cannot serve this type of module.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither build nor build_at")

    @classmethod
    def combination(cls, methods: Sequence["Method"], rank: int | None) -> "Method":
        """The method whose delta modules can hold weighted sums of these methods'. `rank`: to hold them in, if it has one."""
        return cls()

    def train_also(self) -> tuple[str, ...]:
        """Selectors of backbone modules that are trained whole beside the delta modules."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data, as a delta's file holds it: `{"method": name, option: value}`."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"method": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Method":
        """The method that `to_dict` described.

        Raises:
            CheckpointError: if the method, or one of its options, is unknown to this version.
        """
        name = data.get("method")
        kind = METHODS.get(str(name))
        if kind is None:
            raise CheckpointError(f"unknown method {name!r}: expected one of {', '.join(sorted(METHODS))}")
        options = {key: value for key, value in data.items() if key != "method"}
        unknown = sorted(options.keys() - {field.name for field in fields(kind)})
        if unknown:
            raise CheckpointError(f"method {name!r} has no option {', '.join(unknown)}; a newer deltakit wrote this")
        return kind(**options)
