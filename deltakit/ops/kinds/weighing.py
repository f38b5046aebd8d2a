"""Weighings: they compute from one target what several other deltas add there, and add a weighed sum of it."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import (
    DeltaModule,
    Design,
    Target,
    checked,
    delta_children,
    hidden_input,
    hidden_output,
    replace_hidden,
)
from deltakit.errors import OptionError, StateError, TargetError, warn
from deltakit.ops.kinds.maps import in_own_dtype
from deltakit.ops.kinds.output_map import OutputMap


class Weighing(OutputMap):
    """Weighs what other deltas add at its target. The author writes `weigh(h, y, contributions) -> y'`.

    The weighed deltas are attached and not active, and their own `scale` counts. They are found by their names in each call,
    so they may be swapped, detached and attached again. They take part in the backward pass, and their parameters get
    gradients if they require them.

    Args:
        deltas: the names of the weighed deltas, in the order of the contributions.

    Raises:
        OptionError: if there are no names.
        StateError: if one of them has no delta module at the target.
        TargetError: if it has several there, or one that does not only depend on the call of the target, or some add to the
            target's output and some to its input; or if the target's output size is unknown.
    """

    design: ClassVar[Design] = Design(form="sum_i w_i a_i", composition="addition").over(OutputMap.design)
    # The weighed deltas must not be weighed once more, perhaps by each other.
    weighable: ClassVar[bool] = False

    @checked
    def __init__(self, target: Target, deltas: Sequence[str]) -> None:
        if not deltas:
            raise OptionError(f"{self.word()}(deltas=[]): expected the names of the weighed deltas")
        # Before the sizes are looked at: where the deltas do not fit, neither does the target.
        weighed = _weighed_at(target.module, target.part, tuple(deltas), f"{target.named}: {self.word()}")
        super().__init__(target)
        self.deltas = tuple(deltas)
        self.where = f"{target.named}: {self.word()}"
        self.add_to = _add_to(weighed, self.where)
        self.told: set[str] = set()
        """The weighed deltas of which a warning was given. All delta modules of the method have the same set."""

    def weigh(
        self, h: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"], contributions: Float[Tensor, "n *batch d"]
    ) -> Float[Tensor, "*batch d"]:
        """Returns y with the contributions added, weighed.

        Args:
            h: the output of the target.
            y: what the contributions are added to: the same, or the input of a norm (`Adapter(add_to="input")`).
            contributions: what each delta adds to y, in the order of the names.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override weigh(h, y, contributions)")

    def forward(self, x: Shaped[Tensor, "*input"], *given: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Returns what `weigh` returns. given: the contributions, and last what they are added to."""
        *contributions, y = given
        return self.weigh(y if self.add_to == "output" else x, y, torch.stack(contributions))

    def weighed_at(self, target: nn.Module) -> list[DeltaModule]:
        """Returns the delta modules of the weighed deltas at its target, in the order of their names.

        Raises:
            StateError: if a weighed delta has none there, or is active or merged, outside of a `rows` block; or if others have
                their names that add to something else.
            TargetError: if its delta module there cannot be weighed.
        """
        weighed = _weighed_at(target, self.part, self.deltas, self.where)
        # A merged delta is active, too. In a `rows` block each example has one delta, so that none counts twice.
        active = [name for name, module in zip(self.deltas, weighed, strict=True) if _is_active(module)]
        if active and self.batch is None:
            own = self.record.name if self.record is not None else "..."
            raise StateError(
                f"{self.where} weighs the delta {active[0]!r}, which is active and so would count twice; unmerge() it if it "
                f"is merged, and call use(model, {own!r}), or set its active = False"
            )
        if _add_to(weighed, self.where) != self.add_to:
            raise StateError(
                f"{self.where} was attached to weigh deltas that add to the {self.add_to} of this norm, and others have their "
                "names now; attach those again, or attach a new one for these"
            )
        return weighed

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, y = hidden_input(args, kwargs), hidden_output(output)
        weighed = self.weighed_at(target)
        self._warn_trained(weighed)
        contributions = [module.contribution(target, args, kwargs, y) for module in weighed]
        if self.add_to == "output":
            new = self._applied(x, y, *contributions)
        else:
            # As for one such adapter: what other deltas did to the norm's output stays.
            new = y + (target.forward(in_own_dtype(self, y, *contributions, x)) - target.forward(x))
        return replace_hidden(output, new if self.strength == 1 else torch.lerp(y, new, self.strength))

    def _warn_trained(self, weighed: Sequence[DeltaModule]) -> None:
        """Warns once if a training forward would train the weighed deltas beside the weights."""
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        for name, module in zip(self.deltas, weighed, strict=True):
            trained = any(parameter.requires_grad for parameter in module.parameters_read())
            if trained and name not in self.told and any(parameter.requires_grad for parameter in self.parameters()):
                self.told.add(name)
                warn(
                    f"delta {name!r} is trainable, and {self.word()} weighs it: in this training forward its parameters get "
                    "gradients, too, and an optimiser with all parameters of the model trains it; set its trainable = False "
                    "to train the weights alone, or save both deltas"
                )

    def summary(self) -> str:
        return f"of {', '.join(self.deltas)}"


def _is_active(module: DeltaModule) -> bool:
    return module.record is not None and module.record.active


def _weighed_at(target: nn.Module, part: str, deltas: Sequence[str], where: str) -> list[DeltaModule]:
    """Returns the delta modules of some deltas on one part of a module.

    Raises:
        StateError: if a delta has none.
        TargetError: if it has several, or one that cannot be weighed.
    """
    there: dict[str, list[DeltaModule]] = {name: [] for name in deltas}
    for child in delta_children(target).values():
        if child.record is not None and child.record.name in there and child.part == part:
            there[child.record.name].append(child)
    found = []
    for name, modules in there.items():
        if not modules:
            raise StateError(
                f"{where} weighs the delta {name!r}, which has no delta module here; attach() it if it is detached, or leave "
                "this target out with exclude="
            )
        if len(modules) > 1:
            words = " and ".join(module.word() for module in modules)
            raise TargetError(
                f"{where} weighs one delta module of each delta, and delta {name!r} has {words} here; attach its methods as "
                "deltas of their own, or leave this target out with exclude="
            )
        (module,) = modules
        if not module.weighable or module.reads_call or module.weight_read is not None:
            patched = module.weight_read is not None
            why = "patches the weight" if patched else "changes or reads more than this module's output"
            raise TargetError(
                f"{where} cannot weigh the {module.word()} of delta {name!r}, which {why}; leave this target out with "
                "exclude=, or weigh other deltas"
            )
        found.append(module)
    return found


def _add_to(weighed: Sequence[DeltaModule], where: str) -> Literal["output", "input"]:
    """Returns what the delta modules of a module add to.

    Raises:
        TargetError: if it is not the same for all of them.
    """
    found = {module.add_to if isinstance(module, OutputMap) else "output" for module in weighed}
    if len(found) > 1:
        raise TargetError(
            f"{where} cannot weigh deltas together that add to the input and to the output of this norm (add_to=); weigh "
            "deltas of one kind"
        )
    return found.pop()
