"""Gated: a method whose delta modules have the effect of another method's, each times its gate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltakit.core import (
    BackboneView,
    DeltaModule,
    Method,
    Target,
    hidden_input,
    hidden_output,
    replace_hidden,
    replace_input,
)
from deltakit.errors import OptionError, TargetError
from deltakit.ops import CallContext
from deltakit.searching.gates import Gates


class GatedDelta(DeltaModule):
    """Calls another delta module, and takes the share of its change that a gate says."""

    def __init__(self, inner: DeltaModule, gates: Gates, number: int) -> None:
        super().__init__()
        self.inner = inner
        # Not a child: its parameters are not those of the delta.
        self.__dict__["gates"] = gates
        self.number = number

    @property
    def reads_call(self) -> bool:  # type: ignore[override]
        """Whether the other delta module reads the backbone's call."""
        return self.inner.reads_call

    def tag_of(self, name: str) -> str:
        return self.inner.tag_of(name.removeprefix("inner."))

    def passed(self, before: Tensor, after: Tensor) -> Tensor:
        """Returns before + gate * (after - before)."""
        gate = self.__dict__["gates"].values[self.number].to(before.device, before.dtype)
        return before + gate * (after - before)


class GatedOutputDelta(GatedDelta):
    """Of a delta module that changes the output."""

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        new = self.inner.after_call(target, args, kwargs, output)
        if new is None:
            return None
        return replace_hidden(output, self.passed(hidden_output(output), hidden_output(new)))


class GatedInputDelta(GatedDelta):
    """Of a delta module that changes the input."""

    def before_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = self.inner.before_call(target, args, kwargs)
        if new is None:
            return None
        return replace_input(args, kwargs, self.passed(hidden_input(args, kwargs), hidden_input(*new)))


@dataclass(frozen=True, kw_only=True)
class Gated(Method):
    """Attaches gated delta modules of another method.

    Args:
        inner: the method.
        gates: the gates of all candidates.
        numbers: for each path the number of its gate.
    """

    inner: Method
    gates: Gates
    numbers: Mapping[str, int]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the other method, so that two of one kind at one target are refused as usual."""
        return self.inner.name

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        inner = self.inner.kind_at(target)
        return None if inner is None else _kind_of(inner)

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        built = self.inner.build(index, targets)
        # What has no number is a tap, which changes nothing.
        return {
            path: _kind_of(type(module))(module, self.gates, self.numbers[path]) if path in self.numbers else module
            for path, module in built.items()
        }


def _kind_of(inner: type[DeltaModule]) -> type[GatedDelta]:
    return GatedOutputDelta if inner.acts_after() else GatedInputDelta


def check_candidate(method: Method, path: str, module: DeltaModule) -> None:
    """Refuses a delta module whose effect cannot be multiplied by a gate of its own.

    Raises:
        TargetError: if it patches a weight.
        OptionError: if it has no scale, acts on a whole call, or shares tensors with others.
    """
    if module.weight_read is not None:
        raise TargetError(
            f"search: at {path or 'the backbone'} {method.name} patches a weight that is read directly, and a gate needs a "
            "module that is called; leave it out with exclude="
        )
    if not module.scalable or isinstance(module, CallContext):
        raise OptionError(
            f"search: the effect of {method.name} cannot be multiplied by a gate; leave it out of the candidates"
        )
    if module.shared is not None or not any(True for _ in module.trained_parameters()):
        raise OptionError(
            f"search: the targets of {method.name} share tensors, so none of them stands alone; leave it out of the "
            "candidates, or switch the sharing off if it has an option for that"
        )
