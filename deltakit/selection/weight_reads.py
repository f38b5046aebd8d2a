"""Finds weights that are read directly: a forward uses `self.proj.weight` without calling `self.proj`.

An output hook on such a layer never runs, so its deltas need a weight patch. The code of the classes tells which layers
these are: WavLM passes `self.out_proj.weight` to torch's attention function, Mamba passes `self.dt_proj.weight` to a kernel.
"""

import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import takewhile
from types import CodeType
from typing import Any

from torch import nn

from deltakit.core import WeightRead, above, is_callable, join, own_children, projection_sizes


@dataclass
class WeightReads:
    """The direct weight reads of one backbone.

    `modules` are its modules by path, `names` the names of each parameter by the parameter's id.
    """

    modules: Mapping[str, nn.Module]
    names: Mapping[int, Sequence[str]]
    _known: dict[tuple[type, str], bool] = field(default_factory=dict)
    _codes: dict[type, list[CodeType]] = field(default_factory=dict)

    def of(self, owner: str, parameter: str) -> WeightRead | None:
        """Returns where a target's weight is read; None if the target is a module that is called as usual.

        Args:
            owner: the path of the module.
            parameter: the name of the parameter if the target is a parameter, else "".
        """
        found = self._read_around(owner, parameter or "weight")
        if not parameter:
            return found
        found = found or self._read_in_forward(owner)
        # The holder may also be called on its own, without the module around it. Then the patch must be there too.
        by_itself = not found.never_called and found.scope != owner and is_callable(self.modules[owner])
        also = [WeightRead(owner, "")] if by_itself else []
        for name in self.names[id(self.modules[owner]._parameters[parameter])]:
            other, _, last = name.rpartition(".")
            if other != owner:
                there = self._read_around(other, last) or WeightRead(other, "")
                also.append(replace(there, name=last))
        return replace(found, also=tuple(also))

    def _read_around(self, owner: str, read: str) -> WeightRead | None:
        """The read by the nearest module around, if its code reads the weight."""
        scope, below = owner, ""
        while scope:
            scope, _, name = scope.rpartition(".")
            if not name.isidentifier():
                # No code of a module further out can name it: it is in a list.
                return None
            below = join(name, below) if below else name
            module = self.modules[scope]
            if below == "out_proj" and isinstance(module, nn.MultiheadAttention):
                return WeightRead(scope, below, never_called=True)
            if self._reads(type(module), f"{below}.{read}"):
                return WeightRead(scope, below, never_called=only_reads(type(module), below))
        return None

    def _read_in_forward(self, owner: str) -> WeightRead:
        """The read of a parameter that no code around its holder is seen to read: in the holder's own forward.

        For a plain layer it is the forward around the layer. Code there may read the parameter in ways that the search does
        not see, and a patch during that forward covers both cases.
        """
        module = self.modules[owner]
        if is_callable(module) and (any(own_children(module)) or projection_sizes(module) is None):
            return WeightRead(owner, "")
        scope = next((path for path in list(above(owner))[1:] if is_callable(self.modules[path])), owner)
        return WeightRead(scope, owner[len(scope) :].lstrip("."))

    def other_names(self, owner: str, parameter: str) -> list[str]:
        """Returns the other names of a tied parameter."""
        names = self.names[id(self.modules[owner]._parameters[parameter])]
        return [name for name in names if name != join(owner, parameter)]

    def _reads(self, kind: type, chain: str) -> bool:
        if (kind, chain) not in self._known:
            if kind not in self._codes:
                self._codes[kind] = list(_codes(kind))
            self._known[kind, chain] = _read_in(self._codes[kind], chain)
        return self._known[kind, chain]


# Attributes of a weight that do not depend on its values.
_METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad", "data_ptr"}
)
_INSPECTING = frozenset({"isinstance", "hasattr", "getattr", "setattr", "type", "id"})
# Parts of names of methods that no forward calls. diffusers' `fuse_projections` reads weights that its processors call.
_NOT_FORWARD = ("init", "reset", "load", "save", "resize", "tie", "extra_repr", "prune", "fuse_projections")


def reads(kind: type, chain: str) -> bool:
    """Returns whether a class's methods read the values at an attribute chain of `self`, such as `out_proj.weight`.

    Methods of torch's own classes are not searched: `nn.MultiheadAttention` is handled by name, and the others call their
    modules when hooks are registered.
    """
    return _read_in(_codes(kind), chain)


def _read_in(codes: Iterable[CodeType], chain: str) -> bool:
    wanted = chain.split(".")
    if not all(name.isidentifier() for name in wanted):
        return False
    size = len(wanted)
    return any(
        names[:size] == wanted and not _METADATA.intersection(names[size:][:1])
        for code in codes
        for names in _chains(code)
    )


def only_reads(kind: type, chain: str) -> bool:
    """Returns whether a class uses the module at an attribute chain only through its attributes, so it never calls it.

    WavLM's attention passes `self.out_proj.weight` to torch's function and has no `self.out_proj(...)`.
    """
    wanted = chain.split(".")
    uses = [names for code in _codes(kind) for names in _chains(code) if names[: len(wanted)] == wanted]
    return bool(uses) and all(len(names) > len(wanted) for names in uses)


def _codes(kind: type) -> Iterator[CodeType]:
    """The code of all methods of a class that a forward may call, and of the functions defined inside them."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if callable(method) else None
            if inspect.isfunction(function) and not any(word in name for word in _NOT_FORWARD):
                yield from _nested(function.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _nested(inner)


# All models share the code of torch's and transformers' classes, and reading byte code was most of the time of an attach.
@lru_cache(4096)
def _chains(code: CodeType) -> tuple[list[str], ...]:
    """Every attribute chain that a code object loads from `self`, except arguments of `isinstance`, `hasattr` and the like.

    Byte code is searched and not source text, because classes made by `exec` or shipped without sources have no text.
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    return tuple(
        [str(following.argval) for following in takewhile(_loads_attribute, steps[place + 1 :])]
        for place, step in enumerate(steps)
        if _loads_self(step) and not (place and steps[place - 1].argval in _INSPECTING)
    )


def _loads_attribute(step: Any) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _loads_self(step: Any) -> bool:
    """Whether an instruction leaves `self` on top of the stack. Python 3.10 to 3.14 use different instructions for it."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD_FAST")):
        return False
    return step.argval == "self" or (isinstance(step.argval, tuple) and step.argval[-1] == "self")
