"""Where a backbone reads weights itself instead of calling the module that holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from deltakit.inference.walk import above
from deltakit.linears import projection_sizes
from deltakit.method import Reading
from deltakit.paths import join
from deltakit.reads import only_reads, reads


@dataclass
class Readings:
    """What is read on one backbone. `modules`: by path; `names`: those of each parameter, by its id."""

    modules: Mapping[str, nn.Module]
    names: Mapping[int, Sequence[str]]
    _known: dict[tuple[type, str], bool] = field(default_factory=dict)

    def of(self, owner: str, parameter: str) -> Reading | None:
        """Where a weight is read that is a target itself, or whose module is not called; None if it is called."""
        read = parameter or "weight"
        for scope in above(owner):
            module = self.modules[scope]
            below = owner[len(scope) :].lstrip(".")
            if isinstance(module, nn.MultiheadAttention) and below == "out_proj":
                return Reading(scope, below, never_called=True)
            if below and self._reads_itself(type(module), join(below, read)):
                return Reading(scope, below, never_called=only_reads(type(module), below))
        if not parameter:
            return None
        first, *others = self.names[id(self.modules[owner]._parameters[parameter])]
        if others:
            return self._tied_reading(first, others)
        if self.modules[owner]._modules or projection_sizes(self.modules[owner]) is None:
            return Reading(owner, "")
        # A layer that is called, or read by what is around it: the forward around it covers both.
        scope = next(path for path in list(above(owner))[1:] if not _is_list(self.modules[path]))
        return Reading(scope, owner[len(scope) :].lstrip("."))

    def other_names(self, owner: str, parameter: str) -> list[str]:
        names = self.names[id(self.modules[owner]._parameters[parameter])]
        return [name for name in names if name != join(owner, parameter)]

    def _tied_reading(self, first: str, others: Sequence[str]) -> Reading:
        """A weight that several modules hold is read somewhere below the module around them all."""
        owners = [name.rpartition(".")[0] for name in (first, *others)]
        scope = next(path for path in above(owners[0]) if all(path in above(o) for o in owners))
        below = [name[len(scope) :].lstrip(".") for name in (first, *others)]
        return Reading(scope, below[0].rpartition(".")[0], also=tuple(below[1:]))

    def _reads_itself(self, kind: type, chain: str) -> bool:
        if (kind, chain) not in self._known:
            self._known[kind, chain] = reads(kind, chain)
        return self._known[kind, chain]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)
