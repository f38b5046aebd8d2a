"""Paths in a backbone: putting them together, taking them apart, and walking them with the deltas left out."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from deltakit.inference.walk import join as join
from deltakit.method import DeltaModule


def held_at(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    """The module of a path, and the name of the parameter in it if the path is that of a parameter."""
    base, _ = split_rows(path)
    if base in modules:
        return modules[base], ""
    owner, _, name = base.rpartition(".")
    return modules[owner], name


def split_rows(path: str) -> tuple[str, str]:
    """A path without its rows, and the letter of these.

    >>> split_rows("h.0.attn.c_attn[q]"), split_rows("h.0")
    (('h.0.attn.c_attn', 'q'), ('h.0', ''))
    """
    base, _, rows = path.partition("[")
    return base, rows.removesuffix("]")


def own_modules(backbone: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the backbone without the deltas', by path, each once or under every name that it has."""
    seen: set[int] = set()
    # A stack and not recursion, whose generators in each other cost three times as much: this is walked at each attach.
    ahead: list[tuple[str, nn.Module, frozenset[int]]] = [("", backbone, frozenset())]
    while ahead:
        path, module, around = ahead.pop()
        if id(module) in around or (id(module) in seen and not every_name):
            continue
        seen.add(id(module))
        yield path, module
        if module._modules:
            inside = around | {id(module)} if every_name else around
            ahead += [
                (join(path, name), child, inside)
                for name, child in reversed(module._modules.items())
                if child is not None and not isinstance(child, DeltaModule)
            ]


def is_of(module: nn.Module, of: Sequence[str]) -> bool:
    """Whether a module's class, or one it derives from, has one of these names (bare or with its Python module)."""
    names = {
        name for kind in type(module).__mro__ for name in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    }
    return not names.isdisjoint(of)
