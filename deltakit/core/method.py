"""Method: a frozen dataclass of options that builds one delta module for each of its targets.

A new method is one file in `deltakit/methods/`: a `Method` subclass with a name, and the delta module that it builds. No
other file changes: selection, attaching, saving, drawing and the contract tests find the method by its name.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from deltakit.core.alike import built_at
from deltakit.core.arguments import Door, checked
from deltakit.core.delta_module import DeltaModule
from deltakit.core.design import Design
from deltakit.core.method_help import with_shared_options
from deltakit.core.method_registry import Registry
from deltakit.core.paths import type_names
from deltakit.core.target import Target
from deltakit.errors import CheckpointError, OptionError

METHODS: Registry[type["Method"]] = Registry()
"""All method classes by name. Defining a `Method` subclass with a name adds it."""

Selector = str | Sequence[str]


@runtime_checkable
class BackboneView(Protocol):
    """The part of `selection.BackboneIndex` that methods may use to look at a backbone."""

    backbone: nn.Module
    by_path: dict[str, nn.Module]

    @property
    def owner(self) -> str:
        """The name of the backbone's class."""

    def target(self, path: str) -> Target:
        """Returns the target at a path."""

    def select(self, at: str | Sequence[str]) -> list[str]:
        """Returns the selected paths, each module instance once."""

    def role(self, role: str) -> Sequence[str]:
        """Returns the paths of the modules that have a role such as `attn.q`."""


class MethodType(type):
    """The class of method classes: it checks the options of each method by their annotations, those of third parties too.

    The checks stand here and not in `Method.__init__`, because each dataclass gets an `__init__` of its own. It is no
    `ABCMeta`, which takes no `name=` in Python 3.10.
    """

    _own_door: Door

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = cls._door().read(args, kwargs)
        return super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        # Without it, help() would show the arguments of `__call__` above.
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def _door(cls) -> Door:
        if "_own_door" not in vars(cls):
            cls._own_door = Door(cls)
        return cls._own_door


@dataclass(frozen=True, kw_only=True)
class Method(metaclass=MethodType):
    """The options of a method: what to attach, and where.

    Args:
        at: selectors of the targets: one or a list, such as "q_proj", "encoder/@attn.q" or "layers.{0-5}". By default the
            positions of the method's paper.
        of: types of modules, as classes or their names, such as nn.Linear. Only targets of these types are used.
        exclude: selectors of what is left out of these targets, such as "@head".

    Raises:
        OptionError: if an option is out of its range or of the wrong type.
    """

    at: Selector | None = None
    of: type[nn.Module] | str | Sequence[type[nn.Module] | str] | None = None
    exclude: Selector | None = None

    name: ClassVar[str]

    _in_words: ClassVar[str] = "a method such as LoRA(r=8)"
    """How error messages name what is expected where a method is."""

    per_target: ClassVar[tuple[str, ...]] = ()
    """The options that may differ between targets (`core.PerTarget`). Before anything is built, attaching replaces the method
    by one for each value."""

    kind: ClassVar[type[DeltaModule]] = DeltaModule
    """The class of its delta modules. A method with several classes overrides `kind_at`."""

    copied: ClassVar[Sequence[type[DeltaModule]]] = ()
    """The classes of delta modules that differ between linear layers of one size only in the values of their parameters. For
    each size one is built, and the others are copies, with `DeltaModule.set_start_values`. Subclasses do not inherit it."""

    identity: ClassVar[bool] = True
    """Whether the outputs stay bit-exact while a delta is attached and untrained."""

    design: ClassVar[Design] = Design()
    """What it changes, and how: the words that differ from those of its kind. `deltakit methods` prints them."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Values for options that have no default, with which `deltakit methods` builds one."""
    lora_elsewhere: ClassVar[bool] = False
    """Whether other formats get a LoRA with the same effect (`combination` of one delta module)."""

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__doc__ = with_shared_options(cls.__doc__, Method.__doc__)
        if name is not None:
            if cls.kind is DeltaModule and cls.kind_at is Method.kind_at:
                raise TypeError(f"{cls.__name__}: set `kind` to the class of its delta modules, or override kind_at()")
            cls.name = name
            METHODS.register(name, cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", type_names(self.of))
        for option in ("at", "exclude"):
            value = getattr(self, option)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, option, tuple(value))
        for option in self.per_target:
            value = getattr(self, option)
            if isinstance(value, Mapping):
                if not value:
                    what = "expected at least one selector with a value, such as {'*': 8}"
                    raise OptionError(f"{type(self).__name__}({option}={{}}): {what}")
                object.__setattr__(self, option, dict(value))
        self.validate()

    def validate(self) -> None:
        """Checks the options. Each method with options overrides it.

        Raises:
            OptionError: if an option is out of its range.
        """

    @property
    def weighed(self) -> tuple[str, ...]:
        """The names of the attached deltas that it weighs (`ops.WeighingMethod`); none for other methods."""
        return ()

    def positions(self) -> tuple[tuple[str, ...], ...]:
        """Returns the default positions as roles.

        A unit is one attention or one feed-forward part of a block. For each inner tuple and each unit, the first role that
        the unit has is used: `("attn.q", "attn.qkv")` selects the fused projection where there is no separate query.
        """
        return ()

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        """Returns the targets of the method.

        Args:
            selected: the targets that `at` or the default positions select; None if there are neither.

        Raises:
            TargetError: if a selected target is not one that the method can use.
            RoleError: if a method that looks for targets itself finds none.
        """
        return selected or ()

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        """Returns the class of delta module for a target; None if the method cannot be used there."""
        return self.kind if self.kind.patches_weight(target) or not target.never_called else None

    def build_at(self, target: Target) -> DeltaModule:
        """Returns the delta module for one target, on its device and in its dtype. By default `kind_at(target)(target)`.

        Raises:
            TargetError: if the method cannot be used on this type of module.
            OptionError: if an option does not fit this target.
        """
        build: Any = self.kind_at(target) or self.kind
        module: DeltaModule = build(target)
        return module

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module | None:
        """Returns a module that all delta modules of this method share as `self.shared`; None if they share nothing.

        The first of them registers it, so that its parameters are counted, moved and saved once.
        """
        return None

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        """Returns the delta modules by the path of their target.

        Raises:
            TargetError: if the method cannot be used on the type of a target.
            OptionError: if an option does not fit a target.
        """
        shared = self.build_shared(index, targets)
        # Looked up in the class itself: a subclass may build something else at each target.
        built = built_at(targets, self, vars(type(self)).get("copied", ()))
        if shared is not None:
            for number, module in enumerate(built.values()):
                module.share(shared, holds=number == 0)
        return built

    def penalty(self, modules: Sequence[DeltaModule]) -> Tensor | float:
        """Returns what the method adds to the loss (`Delta.penalty`): a scalar, 0 by default.

        Args:
            modules: all its delta modules in one delta.
        """
        return 0.0

    def step(self, modules: Sequence[DeltaModule]) -> None:
        """Changes its delta modules once a step, while their gradients are there (`Delta.step`). By default it does nothing.

        What it must remember belongs in buffers with the tag "training".

        Raises:
            StateError: if the gradients that it needs are not there.
        """

    def unfinished(self, modules: Sequence[DeltaModule], *, loaded: bool) -> str:
        """Returns what a training run left out, for a warning at saving; "" by default. `loaded`: whether its values were."""
        return ""

    def with_rank(self, r: int) -> "Method":
        """Returns the method with another rank and the same scale, for methods that start from data (`attach_from_data`).

        Raises:
            OptionError: if the method has no rank, or needs another start.
        """
        raise OptionError(f"{self.name} does not start from data; write LoRA(), or use attach()")

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> "Method":
        """Returns the method whose delta module can hold a weighted sum of these delta modules.

        Args:
            parts: the delta modules at one target, all of methods of this class.
            rank: the rank of the sum, for methods with a rank; None for an exact sum.
        """
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Returns the method as the plain data of a delta's file: `{"method": name, option: value}`."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"method": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}}

    @staticmethod
    def _advice_for(value: object) -> str:
        """Returns what to write instead of something that is no method."""
        if isinstance(value, str):
            kind = next(
                (kind for name, kind in METHODS.items() if value.lower() in (name, kind.__name__.lower())), None
            )
            return f"write {kind.__name__}()" if kind is not None else ""
        if type(value).__module__.startswith("peft."):
            given = {"r": "r", "alpha": "lora_alpha", "at": "target_modules", "dropout": "lora_dropout"}
            options = {ours: getattr(value, theirs, None) for ours, theirs in given.items()}
            options["at"] = sorted(options["at"]) if isinstance(options["at"], set) else options["at"]
            written = ", ".join(f"{name}={option!r}" for name, option in options.items() if option)
            return f"write a method with its options, such as LoRA({written})"
        return ""

    @classmethod
    @checked
    def from_dict(cls, data: Mapping[str, Any]) -> "Method":
        """Returns the method that `to_dict` described.

        Raises:
            CheckpointError: if the method, or one of its options, is unknown to this version.
            OptionError: if an option is out of its range.
        """
        name = data.get("method")
        kind = METHODS.get(str(name))
        if kind is None:
            raise CheckpointError(
                f"unknown method {name!r}: expected one of {', '.join(sorted(METHODS))}; import the file that defines it, or "
                "upgrade deltakit"
            )
        options = {key: value for key, value in data.items() if key != "method"}
        unknown = sorted(options.keys() - {field.name for field in fields(kind)})
        if unknown:
            raise CheckpointError(
                f"method {name!r} has no option {', '.join(unknown)}: a newer deltakit wrote this; upgrade deltakit"
            )
        return kind(**options)
