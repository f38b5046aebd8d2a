"""Where a backbone reads weights itself instead of calling the module that holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from deltakit.inference.walk import above, is_callable
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
        reading = self._read_around(owner, parameter or "weight")
        if not parameter:
            return reading
        reading = reading or self._called(owner)
        # A holder that may be called too is covered by itself: it may run without the module around it.
        by_itself = not reading.never_called and reading.scope != owner and is_callable(self.modules[owner])
        also = [Reading(owner, "")] if by_itself else []
        for name in self.names[id(self.modules[owner]._parameters[parameter])]:
            other, _, last = name.rpartition(".")
            if other != owner:
                there = self._read_around(other, last) or Reading(other, "")
                also.append(replace(there, name=last))
        return replace(reading, also=tuple(also))

    def _read_around(self, owner: str, read: str) -> Reading | None:
        """The module around a weight whose code reads it."""
        for scope in above(owner):
            module = self.modules[scope]
            below = owner[len(scope) :].lstrip(".")
            if isinstance(module, nn.MultiheadAttention) and below == "out_proj":
                return Reading(scope, below, never_called=True)
            if below and self._reads_itself(type(module), join(below, read)):
                return Reading(scope, below, never_called=only_reads(type(module), below))
        return None

    def _called(self, owner: str) -> Reading:
        """Where a parameter is read that no code is seen to read from outside: in the forward of what holds it.

        A layer may be read by what is around it in ways that are not seen; the forward around it covers both.
        """
        module = self.modules[owner]
        if is_callable(module) and (module._modules or projection_sizes(module) is None):
            return Reading(owner, "")
        scope = next((path for path in list(above(owner))[1:] if is_callable(self.modules[path])), owner)
        return Reading(scope, owner[len(scope) :].lstrip("."))

    def other_names(self, owner: str, parameter: str) -> list[str]:
        names = self.names[id(self.modules[owner]._parameters[parameter])]
        return [name for name in names if name != join(owner, parameter)]

    def _reads_itself(self, kind: type, chain: str) -> bool:
        if (kind, chain) not in self._known:
            self._known[kind, chain] = reads(kind, chain)
        return self._known[kind, chain]
