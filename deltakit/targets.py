"""From selectors to modules: which modules of a backbone a method gets; never the deltas' own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from deltakit.errors import RoleError, SelectorError, TargetError
from deltakit.inference import infer_roles
from deltakit.method import DeltaModule, Method, Selector, Target, type_names
from deltakit.roles import RoleMap
from deltakit.selectors import select_paths


@dataclass
class Modules:
    """The modules of a backbone by path, the deltas' own left out, and what follows from them."""

    backbone: nn.Module
    by_path: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, nn.Module):
            raise TargetError(
                f"expected a torch.nn.Module as the backbone, found {type(self.backbone).__name__}; "
                "pass the model itself"
            )
        self.by_path = dict(own_modules(self.backbone, every_name=True))

    @property
    def owner(self) -> str:
        return type(self.backbone).__name__

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """All paths of each module instance, by its id."""
        names: dict[int, list[str]] = {}
        for path, module in self.by_path.items():
            names.setdefault(id(module), []).append(path)
        return names

    @cached_property
    def roles(self) -> RoleMap:
        unique = {path: module for path, module in self.by_path.items() if self.names[id(module)][0] == path}
        return infer_roles(self.backbone, unique)

    @cached_property
    def _widths(self) -> dict[str, int | None]:
        return {unit.path: unit.width for unit in self.roles.units}

    def target(self, path: str) -> Target:
        """The target at a path, under the first path of its module instance."""
        module = self.by_path[path]
        first, *aliases = self.names[id(module)]
        return Target(first, module, tuple(aliases), self._width(first))

    def _width(self, path: str) -> int | None:
        parts = path.split(".")
        above = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((self._widths[name] for name in above if name in self._widths), None)

    def select(self, at: Selector, *, of: Sequence[str] | None = None, exclude: Selector | None = None) -> list[str]:
        """The selected paths, each module instance once. Raises `SelectorError` where nothing is left."""
        hits = select_paths(at, list(self.by_path), self._role, owner=self.owner)
        return self.narrow(hits, of=of, exclude=exclude, wanted=repr(at))

    def narrow(
        self, paths: Sequence[str], *, of: Sequence[str] | None, exclude: Selector | None, wanted: str
    ) -> list[str]:
        """Those of the paths that `of` and `exclude` leave, each module instance once."""
        hits = list(paths)
        if exclude is not None:
            out = set(select_paths(exclude, list(self.by_path), self._role, owner=self.owner))
            hits = [path for path in hits if path not in out]
        if of is not None:
            hits = [path for path in hits if is_of(self.by_path[path], of)]
        if not hits:
            raise SelectorError(
                f"{wanted} selects {len(paths)} modules of {self.owner}, but of={of!r} and exclude={exclude!r} "
                "leave none of them"
            )
        return list(dict.fromkeys(self.names[id(self.by_path[path])][0] for path in hits))

    def _role(self, role: str) -> Sequence[str]:
        hits = self.roles.paths(role)
        fused = self.roles.paths("attn.qkv") if role in ("attn.q", "attn.k", "attn.v") and not hits else ()
        if fused:
            raise RoleError(
                f"role '@{role}': the attention of {self.owner} computes q, k and v in one fused module ({fused[0]}); "
                "write '@attn.qkv' to adapt the whole of it"
            )
        return hits


def join(path: str, name: str) -> str:
    """The path of what is called `name` at `path`."""
    return f"{path}.{name}" if path else name


def own_modules(backbone: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the backbone without the deltas', by path, each once or under every name that it has."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in above or (id(module) in seen and not every_name):
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, DeltaModule):
                yield from walk(join(path, name), child, above | {id(module)})

    return walk("", backbone, frozenset())


def is_of(module: nn.Module, of: Sequence[str]) -> bool:
    """Whether a module's class, or one it derives from, has one of these names (bare or with its Python module)."""
    names = {
        name for kind in type(module).__mro__ for name in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    }
    return not names.isdisjoint(of)


def select(
    backbone: nn.Module,
    at: Selector,
    *,
    of: type[nn.Module] | str | Sequence[type[nn.Module] | str] | None = None,
    exclude: Selector | None = None,
) -> dict[str, nn.Module]:
    """The modules that a selector picks, by path.

    >>> list(select(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "*", of=nn.Linear))
    ['0']

    Raises:
        SelectorError: if a selector is malformed or picks nothing; nearest paths are named.
        RoleError: if a role has no sure answer on this backbone.
    """
    modules = Modules(backbone)
    return {path: modules.by_path[path] for path in modules.select(at, of=type_names(of), exclude=exclude)}


def find_targets(modules: Modules, method: Method) -> list[Target]:
    """The targets of a method: by its selectors, or by its default positions.

    Raises:
        SelectorError: if a selector picks nothing.
        RoleError: if the default positions are not found on this backbone.
    """
    of, exclude = type_names(method.of), method.exclude
    if method.at is not None:
        paths = modules.select(method.at, of=of, exclude=exclude)
    else:
        wanted = f"the default of {method.name}"
        paths = modules.narrow(_default_paths(modules, method), of=of, exclude=exclude, wanted=wanted)
    placed = method.place(modules.backbone, [modules.target(path) for path in paths])
    return list({target.path: target for target in placed}.values())


def _default_paths(modules: Modules, method: Method) -> list[str]:
    paths = method.default_targets(modules.backbone)
    if paths is None:
        paths = [path for roles in method.default_roles for path in _first_role(modules, roles)]
    if not paths:
        wanted = ", ".join("@" + roles[0] for roles in method.default_roles) or "its own positions"
        raise RoleError(
            f"{method.name}: no default position: nothing in {modules.owner} answers {wanted}; "
            f"say where with at=, for example at='**' with of=nn.Linear"
        )
    found = set(paths)
    return [path for path in modules.by_path if path in found]


def _first_role(modules: Modules, roles: Sequence[str]) -> list[str]:
    """In each unit, what answers the first role that the unit has; for roles without units, all that answer."""
    kind, _, _ = roles[0].partition(".")
    if kind not in ("attn", "ff"):
        return list(modules.roles.paths(roles[0]))
    hits = []
    for unit in modules.roles.units:
        if unit.kind == kind:
            own = {f"{kind}.{part}": path for part, path in unit.parts.items()}
            if unit.path in modules.roles.paths(kind):
                own[kind] = unit.path
            hits += [own[role] for role in roles if role in own][:1]
    return hits
