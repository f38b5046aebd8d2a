"""What a method is: a frozen dataclass of options that builds one delta module for each of its targets.

A new method is one file in `deltakit/methods/`: a `Method` subclass with a name, and the `DeltaModule` it builds.
Nothing else is edited; matching, attaching, saving, drawing and the contract tests find it by its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from deltakit.core.delta_module import DeltaModule
from deltakit.core.paths import type_names
from deltakit.core.target import Target
from deltakit.errors import CheckpointError

METHODS: dict[str, type["Method"]] = {}
"""Every method by its name; filled as their classes are defined."""

Selector = str | Sequence[str]


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
        return self.weights or not (target.parameter or (target.weight_read and target.weight_read.never_called))

    def by_weight(self, target: Target) -> bool:
        """Whether the delta module at a target works by the weight instead of by the output."""
        return self.weights and target.weight_read is not None

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
