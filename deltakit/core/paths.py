"""Joins, splits and walks the paths of a backbone. Walks leave the deltas out."""

import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from deltakit.core.delta_module import DeltaModule
from deltakit.core.held import held_in
from deltakit.core.running_call import RunningCall


class _Walk(NamedTuple):
    backbone: nn.Module
    modules: list[tuple[str, nn.Module]]
    call: RunningCall
    under_every_name: list[tuple[str, nn.Module]]
    """Empty until somebody asks for it."""
    notes: dict[str, Any]
    """What was found in the modules, by a word for it."""


_WALK: ContextVar[_Walk | None] = ContextVar("deltakit_walk", default=None)
T = TypeVar("T")

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_SLICED = re.compile(r"(.+)\[(\w+)\]", re.DOTALL)


def held_at(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    """Returns the module of a path, and the name of the parameter in it ("" if the path is that of a module)."""
    if path in modules:
        return modules[path], ""
    owner, _, name = path.rpartition(".")
    if owner in modules and name in modules[owner]._parameters:
        return modules[owner], name
    base, letter = split_slice(path)
    return held_at(modules, base) if letter else (modules[owner], name)


def module_at(backbone: nn.Module, path: str) -> nn.Module | None:
    """Returns the module of a path; None if there is none."""
    # A fifth of the time of torch's `get_submodule`, which raises.
    module: nn.Module | None = backbone
    for name in path.split(".") if path else ():
        if module is None:
            break
        module = module._modules.get(name)
    return module


def split_slice(path: str, known: Container[str] = ()) -> tuple[str, str]:
    """Returns a path without its feature slice, and the name of the slice ("" without one).

    >>> split_slice("h.0.attn.c_attn[q]"), split_slice("h.0"), split_slice("a[b]", known=["a[b]"])
    (('h.0.attn.c_attn', 'q'), ('h.0', ''), ('a[b]', ''))

    Args:
        known: paths of modules and parameters, whose names may have brackets, too.
    """
    found = None if path in known else _SLICED.fullmatch(path)
    return (found[1], found[2]) if found is not None else (path, "")


def own_modules(backbone: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Returns the paths and modules of the backbone without its deltas, each module once, or once per path if `every_name`."""
    known = _kept(backbone)
    if known is None:
        return _walked(backbone, every_name)
    if not every_name:
        # As it is, and not by `yield from`: an attach goes through it a dozen times.
        return iter(known.modules)
    if not known.under_every_name:
        known.under_every_name[:] = _walked(backbone, every_name)
    return iter(known.under_every_name)


def _kept(backbone: nn.Module) -> _Walk | None:
    known = _WALK.get()
    return None if known is None or known.backbone is not backbone or known.call.over else known


def noted(backbone: nn.Module, word: str, find: Callable[[nn.Module], T]) -> T:
    """Returns what `find` finds in the modules of a backbone. In a `one_walk` block it is found once, until `forget_notes`."""
    known = _kept(backbone)
    if known is None:
        return find(backbone)
    if word not in known.notes:
        known.notes[word] = find(backbone)
    found: T = known.notes[word]
    return found


def change_note(backbone: nn.Module, word: str, change: Callable[[T], T]) -> None:
    """Replaces what `noted` has found, if it has, by what a function makes of it."""
    known = _kept(backbone)
    if known is not None and word in known.notes:
        # In one assignment, so that an interruption leaves the one or the other.
        known.notes[word] = change(known.notes[word])


def forget_notes() -> None:
    """Says that a delta was removed from a backbone, or may be there only in part."""
    known = _WALK.get()
    if known is not None:
        known.notes.clear()


def _walked(backbone: nn.Module, every_name: bool) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    # Nested generators of a recursion took three times as long as this stack,
    # and a call of `own_children` for each module twice as long (measured).
    ahead: list[tuple[str, nn.Module, frozenset[int]]] = [("", backbone, frozenset())]
    while ahead:
        path, module, around = ahead.pop()
        if id(module) in around or (id(module) in seen and not every_name):
            continue
        seen.add(id(module))
        yield path, module
        children = module._modules
        if not children or held_in(children) is not None:
            continue
        prefix = f"{path}." if path else ""
        inside = around | {id(module)} if every_name else around
        # A copy, because another thread may attach a delta here.
        ahead += [
            (prefix + name, child, inside)
            for name, child in list(children.items())[::-1]
            if child is not None and not isinstance(child, DeltaModule)
        ]


@contextmanager
def one_walk(backbone: nn.Module) -> Iterator[None]:
    """Walks a backbone once for all that is done in this block, which may attach and detach deltas, but change no module.

    Attaching a delta would walk it a dozen times, which took half of the time (measured with 1,048 modules). After Ctrl-C the
    walk may be left behind, and is not used: it belongs to the call that has the block.
    """
    if _kept(backbone) is not None:
        yield
        return
    caller = RunningCall(sys._getframe(2))
    token = _WALK.set(_Walk(backbone, list(_walked(backbone, every_name=False)), caller, [], {}))
    try:
        yield
    finally:
        _WALK.reset(token)


def children_of(module: nn.Module) -> tuple[list[tuple[str, nn.Module]], Mapping[str, DeltaModule]]:
    """Returns what is directly inside a module: the modules of its own with their names, and the delta modules by name."""
    children: Any = module._modules
    if held_in(children) is not None:
        return [], children
    own = [
        (name, child) for name, child in children.items() if child is not None and not isinstance(child, DeltaModule)
    ]
    if len(own) == len(children):
        return own, {}
    return own, {name: child for name, child in children.items() if isinstance(child, DeltaModule)}


def own_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the names and modules directly inside a module, without deltas."""
    return children_of(module)[0]


def delta_children(module: nn.Module) -> Mapping[str, DeltaModule]:
    """Returns the delta modules directly inside a module by their names."""
    return children_of(module)[1]


def is_of(module: nn.Module, of: Sequence[str]) -> bool:
    """Returns whether a module's class or one of its bases has one of these names (with or without its Python module)."""
    names = {
        name for kind in type(module).__mro__ for name in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    }
    return not names.isdisjoint(of)


def name_of(path: str) -> str:
    """Returns the last component of a path."""
    return path.rpartition(".")[2]


def wrapped_layer(module: nn.Module) -> nn.Module | None:
    """Returns the layer inside a wrapper of PEFT's kind, whose other parts are PEFT's own; None for any other module."""
    return module._modules.get("base_layer")


def unwrapped(path: str) -> str:
    """Returns the path that a layer would have without PEFT's wrappers around it.

    >>> unwrapped("attn.q_proj.base_layer"), unwrapped("attn.q_proj")
    ('attn.q_proj', 'attn.q_proj')
    """
    return ".".join(name for name in path.split(".") if name != "base_layer")


def parent_of(path: str) -> str:
    """Returns the path without its last component."""
    return path.rpartition(".")[0]


def join(path: str, name: str) -> str:
    """Returns `path.name`, or `name` if the path is empty."""
    return f"{path}.{name}" if path else name


def is_callable(module: nn.Module) -> bool:
    """Returns whether a module has a forward: lists and dictionaries of modules or parameters have none."""
    return not isinstance(module, _LISTS)


def above(path: str) -> Iterator[str]:
    """Yields the path itself and every path above it, from the inside out.

    >>> list(above("a.b"))
    ['a.b', 'a', '']
    """
    while path:
        yield path
        path = parent_of(path)
    yield ""


def own_parameters(backbone: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Yields the backbone's own parameters without those of deltas, each once, under its first name."""
    seen: set[int] = set()
    for path, module in own_modules(backbone):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + name, parameter


def tensors_of(backbone: nn.Module, *, unsaved: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields the backbone's own parameters and saved buffers under every name that they have; also `unsaved` buffers if so."""
    for path, module in own_modules(backbone, every_name=True):
        yield from tensors_in(path, module, unsaved=unsaved)


def tensors_in(path: str, module: nn.Module, *, unsaved: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and saved buffers that the module at a path holds itself; also `unsaved` buffers if so."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and (unsaved or name not in module._non_persistent_buffers_set):
            yield join(path, name), tensor


def names_by_id(named: Iterable[tuple[str, object]]) -> dict[int, list[str]]:
    """Returns all names of each object, by its id: a tied parameter has several, and a module that is used twice.

    >>> one = object()
    >>> names_by_id([("a", one), ("b", one)])[id(one)]
    ['a', 'b']
    """
    names: dict[int, list[str]] = {}
    for name, thing in named:
        names.setdefault(id(thing), []).append(name)
    return names


def type_names(
    of: type[nn.Module] | str | Sequence[type[nn.Module] | str] | None,
) -> tuple[str, ...] | None:
    """Returns the types of `of=` as names, so that a method can be saved. None stays None (any type).

    >>> type_names(nn.Linear)
    ('torch.nn.modules.linear.Linear',)
    """
    if of is None:
        return None
    kinds = (of,) if isinstance(of, str | type) else tuple(of)
    return tuple(kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
