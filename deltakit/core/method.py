"""What a method is: a frozen dataclass of options that builds one delta module for each of its targets.

A new method is one file in `deltakit/methods/`: a `Method` subclass with a name, and the delta module that it builds.
Nothing else is edited; matching, attaching, saving, drawing and the contract tests find it by its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from deltakit.core.delta_module import DeltaModule
from deltakit.core.paths import type_names
from deltakit.core.target import Target
from deltakit.errors import CheckpointError

METHODS: dict[str, type["Method"]] = {}
"""Every method by its name; filled as their classes are defined."""

Selector = str | Sequence[str]


@runtime_checkable
class BackboneView(Protocol):
    """What methods may ask of a backbone (`selection.BackboneIndex`)."""

    backbone: nn.Module
    by_path: dict[str, nn.Module]

    @property
    def owner(self) -> str:
        """The name of the backbone's class."""

    def target(self, path: str) -> Target:
        """The target at a path."""

    def role(self, role: str) -> Sequence[str]:
        """The paths that answer a role such as `attn.q`."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What to attach and where. `at`: selectors, by default the positions of the method's paper.

    `of` narrows the targets to modules of a type (a class, or its name), `exclude` removes what its selectors match.
    """

    at: Selector | None = None
    of: type[nn.Module] | str | Sequence[type[nn.Module] | str] | None = None
    exclude: Selector | None = None

    name: ClassVar[str]

    kind: ClassVar[type[DeltaModule]] = DeltaModule
    """The class of its delta modules. A method with several overrides `kind_at`."""

    identity: ClassVar[bool] = True
    """Whether an attached and untrained delta changes nothing, bit for bit."""

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

    def positions(self) -> tuple[tuple[str, ...], ...]:
        """The default positions as roles. Of each inner tuple the first role that a unit has is taken in that unit.

        A unit is one attention or one feed-forward part of a block.
        """
        return ()

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        """The targets for what `at` or the default positions selected; None if there is neither.

        Raises:
            TargetError: if something else was selected than the method can start from.
            RoleError: if a method without default positions finds no target of its own.
        """
        return selected or ()

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        """The class of delta module that serves a target; None if the method has none for it."""
        return self.kind if self.kind.patches_weight(target) or not target.never_called else None

    def build_at(self, target: Target) -> DeltaModule:
        """The delta module for one target, on its device and in its dtype. By default `kind(target)`.

        Raises:
            TargetError: if the method cannot serve this type of module.
            OptionError: if an option does not fit this target.
        """
        build: Any = self.kind
        module: DeltaModule = build(target)
        return module

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module | None:
        """A module that all delta modules of this method share as `self.shared`; None if they share nothing.

        The first of them holds it, so that it is counted, moved and saved once.
        """
        return None

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        """The delta modules by the path of their target."""
        shared = self.build_shared(index, targets)
        built = {target.path: self.build_at(target) for target in targets}
        if shared is not None:
            for place, module in enumerate(built.values()):
                module.share(shared, holds=place == 0)
        return built

    @classmethod
    def combination(cls, methods: Sequence["Method"], rank: int | None) -> "Method":
        """The method whose delta modules can hold weighted sums of these methods'. `rank`: to hold them in, if it has one."""
        return cls()

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
