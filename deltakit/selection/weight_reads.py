"""Where a backbone reads weights itself instead of calling the module that holds them."""

import dis
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from types import CodeType
from typing import Any

from torch import nn

from deltakit.core import WeightRead, above, is_callable, join, projection_sizes


@dataclass
class WeightReads:
    """What is read on one backbone. `modules`: by path; `names`: those of each parameter, by its id."""

    modules: Mapping[str, nn.Module]
    names: Mapping[int, Sequence[str]]
    _known: dict[tuple[type, str], bool] = field(default_factory=dict)

    def of(self, owner: str, parameter: str) -> WeightRead | None:
        """Where a weight is read that is a target itself, or whose module is not called; None if it is called."""
        reading = self._read_around(owner, parameter or "weight")
        if not parameter:
            return reading
        reading = reading or self._called(owner)
        # A holder that may be called too is covered by itself: it may run without the module around it.
        by_itself = not reading.never_called and reading.scope != owner and is_callable(self.modules[owner])
        also = [WeightRead(owner, "")] if by_itself else []
        for name in self.names[id(self.modules[owner]._parameters[parameter])]:
            other, _, last = name.rpartition(".")
            if other != owner:
                there = self._read_around(other, last) or WeightRead(other, "")
                also.append(replace(there, name=last))
        return replace(reading, also=tuple(also))

    def _read_around(self, owner: str, read: str) -> WeightRead | None:
        """The module around a weight whose code reads it."""
        for scope in above(owner):
            module = self.modules[scope]
            below = owner[len(scope) :].lstrip(".")
            if isinstance(module, nn.MultiheadAttention) and below == "out_proj":
                return WeightRead(scope, below, never_called=True)
            if below and self._reads_itself(type(module), join(below, read)):
                return WeightRead(scope, below, never_called=only_reads(type(module), below))
        return None

    def _called(self, owner: str) -> WeightRead:
        """Where a parameter is read that no code is seen to read from outside: in the forward of what holds it.

        A layer may be read by what is around it in ways that are not seen; the forward around it covers both.
        """
        module = self.modules[owner]
        if is_callable(module) and (module._modules or projection_sizes(module) is None):
            return WeightRead(owner, "")
        scope = next((path for path in list(above(owner))[1:] if is_callable(self.modules[path])), owner)
        return WeightRead(scope, owner[len(scope) :].lstrip("."))

    def other_names(self, owner: str, parameter: str) -> list[str]:
        names = self.names[id(self.modules[owner]._parameters[parameter])]
        return [name for name in names if name != join(owner, parameter)]

    def _reads_itself(self, kind: type, chain: str) -> bool:
        if (kind, chain) not in self._known:
            self._known[kind, chain] = reads(kind, chain)
        return self._known[kind, chain]


# What may be asked of a weight without its values having any effect.
_HARMLESS = frozenset(
    {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad", "data_ptr"}
)
_ASKING = frozenset({"isinstance", "hasattr", "getattr", "setattr", "type", "id"})
# Methods that no forward calls.
_OUTSIDE = ("init", "reset", "load", "save", "resize", "tie", "extra_repr", "prune")


def reads(kind: type, chain: str) -> bool:
    """Whether a class's methods read the values of a chain of attributes of `self`, such as `out_proj.weight`.

    Classes of torch itself count as reading none: `nn.MultiheadAttention` is known, and others call their modules while
    hooks are on.
    """
    wanted = chain.split(".")
    if not all(name.isidentifier() for name in wanted):
        return False
    size = len(wanted)
    return any(
        names[:size] == wanted and not _HARMLESS.intersection(names[size:][:1])
        for code in _codes(kind)
        for names in _chains(code)
    )


def only_reads(kind: type, chain: str) -> bool:
    """Whether a class reads attributes of what stands at a chain, and nowhere takes it whole: it cannot call it.

    WavLM's attention gives `self.out_proj.weight` to torch's function and has no `self.out_proj(...)`.
    """
    wanted = chain.split(".")
    uses = [names for code in _codes(kind) for names in _chains(code) if names[: len(wanted)] == wanted]
    return bool(uses) and all(len(names) > len(wanted) for names in uses)


def _codes(kind: type) -> Iterator[CodeType]:
    """The code of the methods of a class that a forward may call, and of the functions inside them."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if callable(method) else None
            if inspect.isfunction(function) and not any(word in name for word in _OUTSIDE):
                yield from _nested(function.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _nested(inner)


def _chains(code: CodeType) -> Iterator[list[str]]:
    """Every chain of attributes that a code loads from `self`, but those that are only asked about."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    for place, step in enumerate(steps):
        if _loads_self(step) and not (place and steps[place - 1].argval in _ASKING):
            yield [str(following.argval) for following in takewhile(_loads_attribute, steps[place + 1 :])]


def _loads_attribute(step: Any) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _loads_self(step: Any) -> bool:
    """Whether an instruction puts `self` on the stack last, in the spelling of any Python from 3.10 on."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD_FAST")):
        return False
    return step.argval == "self" or (isinstance(step.argval, tuple) and step.argval[-1] == "self")
