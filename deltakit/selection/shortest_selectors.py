"""The shortest selectors that select exactly some modules and nothing else.

Several spellings are written: the ends of paths, ends of one to three names below a scope (`encoder/q`), and roles. Each is
folded. The first in the order of length that the grammar itself reads as exactly these modules is taken; the full paths,
folded, always are.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from deltakit.core import above, fold, parent_of
from deltakit.errors import DeltaError, RoleError
from deltakit.selection.index import BackboneIndex
from deltakit.selection.role_inference.role_map import ROLES

_LENGTHS = (1, 2, 3)
"""How many names the ends of paths below a scope have."""


def shortest_selectors(index: BackboneIndex, paths: Iterable[str]) -> tuple[str, ...]:
    """Returns the fewest and then shortest selectors found that select exactly these modules.

    >>> from torch import nn
    >>> index = BackboneIndex(nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 10), 3, enable_nested_tensor=False))
    >>> shortest_selectors(index, ["layers.0.norm1", "layers.1.norm1", "layers.2.norm1"])
    ('norm1',)
    >>> shortest_selectors(index, ["layers.0.linear1", "layers.1.linear1"])
    ('layers.{0-1}/@ff.up',)

    Args:
        paths: paths of modules of the backbone.
    """
    wanted = list(dict.fromkeys(map(index.first_name, paths)))
    if not wanted:
        return ()
    search = _Search(index, wanted)
    found = sorted(search.spellings(), key=lambda selectors: (len(selectors), sum(map(len, selectors))))
    return next((selectors for selectors in found if search.is_exact(selectors)), search.in_full())


@dataclass
class _Search:
    index: BackboneIndex
    wanted: Sequence[str]
    """The first names of the modules."""
    inside: frozenset[str] = field(init=False)
    """All names of the modules."""

    def __post_init__(self) -> None:
        own = {id(self.index.by_path[path]) for path in self.wanted}
        self.inside = frozenset(path for path, module in self.index.by_path.items() if id(module) in own)

    def spellings(self) -> Iterator[tuple[str, ...]]:
        """Yields lists of selectors that may select exactly the modules, those with roles last."""
        yield self._written({}, self.wanted)
        ends = {length: self._by_end(length) for length in _LENGTHS}
        for length in _LENGTHS:
            yield self._below_scopes(ends[length])
        yield self._below_scopes(self._by_role)

    def is_exact(self, selectors: Sequence[str]) -> bool:
        """Returns whether the grammar reads the selectors as exactly the modules."""
        try:
            return set(self.index.select(selectors)) == set(self.wanted)
        except DeltaError:
            return False

    def in_full(self) -> tuple[str, ...]:
        """Returns the folded full paths."""
        return tuple(selector or "^" for selector in fold(self.wanted))

    def _by_end(self, length: int) -> dict[str, list[str]]:
        """The paths of the backbone by their last names, for those ends that a wanted path has."""
        ends = {end for end in (_end(path, length) for path in self.wanted) if end and not _starts_with_number(end)}
        found: dict[str, list[str]] = {}
        for path in self.index.by_path:
            end = _end(path, length)
            if end in ends:
                found.setdefault(end, []).append(path)
        return found

    @cached_property
    def _by_role(self) -> dict[str, list[str]]:
        """The paths of each role whose paths are all modules; roles with the most wanted ones first."""
        found = {}
        for role in ROLES:
            try:
                paths = list(self.index.role(role))
            except RoleError:
                continue
            if all(path in self.index.by_path for path in paths) and not self.inside.isdisjoint(paths):
                found[f"@{role}"] = paths
        return dict(sorted(found.items(), key=lambda item: -len(self.inside.intersection(item[1]))))

    def _below_scopes(self, classes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """Writes the modules as classes of paths, each alone if all of it is wanted, and else below scopes."""
        by_scope: dict[str, list[str]] = {}
        left = dict.fromkeys(self.wanted)
        for text, members in classes.items():
            if not any(path in left for path in members):
                continue
            scopes = _scopes(members, self.inside)
            alone = "" in scopes.values()
            for scope in [""] if alone else self._folded_ends(list(dict.fromkeys(scopes.values()))):
                by_scope.setdefault(scope, []).append(text)
            left = {path: None for path in left if path not in scopes}
        return self._written(by_scope, list(left))

    def _written(self, by_scope: Mapping[str, Sequence[str]], left: Sequence[str]) -> tuple[str, ...]:
        """Writes classes by their scopes, and what is left by the ends of its paths."""
        found = [
            f"{scope}/{text}" if scope else text for scope, texts in by_scope.items() for text in self._merged(texts)
        ]
        return (*found, *self._folded_ends(left))

    def _folded_ends(self, paths: Sequence[str]) -> list[str]:
        """Returns folded ends of paths that no module has which is not among them."""
        if not paths:
            return []
        own = {id(self.index.by_path[path]) for path in paths}
        others = (path for path, module in self.index.by_path.items() if id(module) not in own)
        taken = {end for path in others for end in _ends(path)}
        return self._merged([self._shortest_end(path, taken) for path in paths])

    def _shortest_end(self, path: str, taken: Collection[str]) -> str:
        for end in _ends(path):
            if end not in taken and not _starts_with_number(end) and end not in self.index.by_path:
                return end
        return path

    def _merged(self, texts: Sequence[str]) -> list[str]:
        """Folds ends of paths, and roles of one kind."""
        groups: dict[str, list[str]] = {}
        for text in texts:
            kind, dot, part = text.partition(".")
            if text.startswith("@") and dot:
                groups.setdefault(f"{kind}.", []).append(part)
            else:
                # Braces with a full path in them would match from the root only.
                own = "@" if text.startswith("@") else "^" if text in self.index.by_path else ""
                groups.setdefault(own, []).append(text)
        return [
            f"{kind if kind.endswith('.') else ''}{text}"
            for kind, parts in groups.items()
            for text in (fold(dict.fromkeys(parts)) if kind != "@" else dict.fromkeys(parts))
        ]


def _scopes(members: Sequence[str], inside: Collection[str]) -> dict[str, str]:
    """Returns for each wanted path of a class the outermost module below which all of the class is wanted.

    The whole class is "", and a path without such a module is left out.
    """
    mixed = {scope for path in members if path not in inside for scope in above(parent_of(path))}
    found = {}
    for path in members:
        scopes = [scope for scope in above(parent_of(path)) if scope not in mixed] if path in inside else []
        if scopes:
            found[path] = scopes[-1]
    return found


def _ends(path: str) -> Iterator[str]:
    """Yields the ends of a path, the shortest first and the path itself last."""
    names = path.split(".")
    for start in reversed(range(len(names))):
        yield ".".join(names[start:])


def _end(path: str, length: int) -> str:
    return ".".join(path.split(".")[-length:])


def _starts_with_number(end: str) -> bool:
    """Whether it starts with an index. Such an end says little without the name of its list."""
    return end.partition(".")[0].isdecimal()
