"""The modules and parameters of a backbone by path, the deltas' own left out, and what follows from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from deltakit.errors import RoleError, SelectorError, TargetError
from deltakit.inference import infer_roles
from deltakit.inference.walk import above
from deltakit.layout import measure
from deltakit.linears import projection_sizes
from deltakit.method import DeltaModule, Reading, Selector, Target
from deltakit.reads import reads
from deltakit.role_names import says_attention
from deltakit.roles import RoleMap, Unit
from deltakit.rows import Rows
from deltakit.selectors import select_paths


@dataclass
class Modules:
    """What selectors pick from on one backbone, and what is known of each path.

    A path is that of a module, of a parameter, or of the rows of a fused projection: `h.0.attn.c_attn[q]`.
    """

    backbone: nn.Module
    by_path: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, nn.Module):
            raise TargetError(
                f"expected a torch.nn.Module as the backbone, found {type(self.backbone).__name__}; "
                "pass the model itself"
            )
        self.by_path = dict(own_modules(self.backbone, every_name=True))
        self._rows: dict[object, dict[str, Rows] | None] = {}
        self._reads: dict[tuple[type, str], bool] = {}

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
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters under every name that they have."""
        return {
            join(path, name): parameter
            for path, module in self.by_path.items()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }

    @cached_property
    def parameter_names(self) -> dict[int, list[str]]:
        """The names of each parameter, by its id: one for each module that holds it, more than one if it is tied."""
        names: dict[int, list[str]] = {}
        for path, module in self.by_path.items():
            if self.names[id(module)][0] != path:
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    names.setdefault(id(parameter), []).append(join(path, name))
        return names

    @cached_property
    def roles(self) -> RoleMap:
        unique = {path: module for path, module in self.by_path.items() if self.names[id(module)][0] == path}
        return infer_roles(self.backbone, unique)

    @cached_property
    def _widths(self) -> dict[str, int | None]:
        return {unit.path: unit.width for unit in self.roles.units}

    def __contains__(self, path: str) -> bool:
        base, letter = split_rows(path)
        return (base in self.by_path or base in self.parameters) and (
            not letter or self._rows_at(base, letter) is not None
        )

    def module_at(self, path: str) -> tuple[nn.Module, str]:
        """The module of a path, and the name of the parameter in it if the path is that of a parameter."""
        base, _ = split_rows(path)
        if base in self.by_path:
            return self.by_path[base], ""
        owner, _, name = base.rpartition(".")
        return self.by_path[owner], name

    def first_name(self, path: str) -> str:
        """The path by which the same module or parameter is known: the first of all that it has."""
        base, letter = split_rows(path)
        if base in self.by_path:
            first = self.names[id(self.by_path[base])][0]
        else:
            first = self.parameter_names[id(self.parameters[base])][0]
        return f"{first}[{letter}]" if letter else first

    def target(self, path: str) -> Target:
        """The target at a path, under the first path of its module instance."""
        first = self.first_name(path)
        base, letter = split_rows(first)
        module, parameter = self.module_at(first)
        owner = base.rpartition(".")[0] if parameter else base
        tensor = module._parameters.get(parameter or "weight")
        return Target(
            first,
            module,
            tuple(self.names[id(module)][1:]),
            self._width(owner),
            parameter=parameter,
            rows=self._rows_at(base, letter) if letter else None,
            reading=self._reading(owner, parameter),
            tied=tuple(self._other_names(owner, parameter or "weight")) if tensor is not None else (),
        )

    def _width(self, path: str) -> int | None:
        return next((self._widths[name] for name in above(path) if name in self._widths), None)

    def _reading(self, owner: str, parameter: str) -> Reading | None:
        """Where a weight is read that is a target itself, or whose module is not called; None if it is called."""
        read = parameter or "weight"
        for scope in above(owner):
            module = self.by_path[scope]
            below = owner[len(scope) :].lstrip(".")
            if isinstance(module, nn.MultiheadAttention) and below == "out_proj":
                return Reading(scope, below, never_called=True)
            if below and self._reads_itself(type(module), join(below, read)):
                return Reading(scope, below)
        if not parameter:
            return None
        first, *others = self.parameter_names[id(self.by_path[owner]._parameters[parameter])]
        if others:
            return self._tied_reading(first, others)
        if self.by_path[owner]._modules or projection_sizes(self.by_path[owner]) is None:
            return Reading(owner, "")
        # A layer that is called, or read by what is around it: the forward around it covers both.
        scope = next(path for path in list(above(owner))[1:] if not _is_list(self.by_path[path]))
        return Reading(scope, owner[len(scope) :].lstrip("."))

    def _other_names(self, owner: str, parameter: str) -> list[str]:
        names = self.parameter_names[id(self.by_path[owner]._parameters[parameter])]
        return [name for name in names if name != join(owner, parameter)]

    def _tied_reading(self, first: str, others: Sequence[str]) -> Reading:
        """A weight that several modules hold is read somewhere below the module around them all."""
        owners = [name.rpartition(".")[0] for name in (first, *others)]
        scope = next(path for path in above(owners[0]) if all(path in above(o) for o in owners))
        below = [name[len(scope) :].lstrip(".") for name in (first, *others)]
        return Reading(scope, below[0].rpartition(".")[0], also=tuple(below[1:]))

    def _reads_itself(self, kind: type, chain: str) -> bool:
        if (kind, chain) not in self._reads:
            self._reads[kind, chain] = reads(kind, chain)
        return self._reads[kind, chain]

    def rows_of(self, unit: Unit) -> dict[str, str]:
        """The paths of queries, keys and values in the fused projection of a unit; empty where it cannot be told."""
        fused = unit.parts.get("qkv") or unit.parts.get("kv")
        if fused is None or fused not in self.by_path:
            return {}
        missing = [letter for letter in "qkv" if letter not in unit.parts]
        return {letter: f"{fused}[{letter}]" for letter in missing if self._rows_at(fused, letter) is not None}

    def _rows_at(self, base: str, letter: str) -> Rows | None:
        module, parameter = self.module_at(base)
        if isinstance(module, nn.MultiheadAttention) and parameter == "in_proj_weight":
            # torch.nn.functional.multi_head_attention_forward: queries, keys and values one after the other.
            size, place = module.embed_dim, "qkv".find(letter)
            return Rows(letter, 1, 3 * size, place * size, (place + 1) * size) if place >= 0 else None
        unit = next((u for u in self.roles.units if base in (u.parts.get("qkv"), u.parts.get("kv"))), None)
        if unit is None or parameter:
            return None
        attention = next((path for path in above(base) if says_attention(type(self.by_path[path]).__name__)), None)
        return (self._measured(attention or unit.path, base, unit) or {}).get(letter)

    def _measured(self, path: str, fused: str, unit: Unit) -> dict[str, Rows] | None:
        attention = self.by_path[path]
        inside = join(path, "") if path else ""
        output = unit.parts.get("o", "")
        # Layers differ in their number only; with it left out one measurement serves them all.
        sizes = tuple((n, v) for n, v in vars(attention).items() if isinstance(v, int | float) and "layer" not in n)
        key = (type(attention), self.by_path[fused].__class__, sizes, fused[len(inside) :], *self._shape(fused))
        if key not in self._rows:
            below = output[len(inside) :] if output.startswith(inside) and output in self.by_path else None
            self._rows[key] = measure(attention, fused[len(inside) :], below)
        return self._rows[key]

    def _shape(self, path: str) -> tuple[int, ...]:
        weight = self.by_path[path]._parameters.get("weight")
        return tuple(weight.shape) if weight is not None else ()

    def select(self, at: Selector, *, of: Sequence[str] | None = None, exclude: Selector | None = None) -> list[str]:
        """The selected paths, each module instance once. Raises `SelectorError` where nothing is left."""
        return self.narrow(self._paths(at), of=of, exclude=exclude, wanted=repr(at))

    def narrow(
        self, paths: Sequence[str], *, of: Sequence[str] | None, exclude: Selector | None, wanted: str
    ) -> list[str]:
        """Those of the paths that `of` and `exclude` leave, each module instance once."""
        hits = list(paths)
        if exclude is not None:
            out = set(self._paths(exclude))
            hits = [path for path in hits if path not in out and split_rows(path)[0] not in out]
        if of is not None:
            hits = [path for path in hits if not self.module_at(path)[1] and is_of(self.module_at(path)[0], of)]
        if not hits:
            raise SelectorError(
                f"{wanted} selects {len(paths)} modules of {self.owner}, but of={of!r} and exclude={exclude!r} "
                "leave none of them"
            )
        return list(dict.fromkeys(map(self.first_name, hits)))

    def _paths(self, at: Selector) -> list[str]:
        return select_paths(at, list(self.by_path), self._role, owner=self.owner, named=self._named)

    def _named(self, rows: bool) -> list[str]:
        """What is picked only where a selector writes it out: parameters, and the rows of fused projections."""
        if not rows:
            return list(self.parameters)
        fused = [path for unit in self.roles.units for path in self.rows_of(unit).values()]
        return fused + [path for unit in self.roles.units for path in unit.parts.values() if "[" in path]

    def _role(self, role: str) -> Sequence[str]:
        kind, _, part = role.partition(".")
        hits = list(self.roles.paths(role))
        if kind == "attn" and part in ("q", "k", "v"):
            for unit in self.roles.units:
                if unit.kind != "attn" or part in unit.parts or not {"qkv", "kv"} & unit.parts.keys():
                    continue
                rows = self.rows_of(unit)
                if part not in rows:
                    raise RoleError(self._untold(role, unit))
                hits.append(rows[part])
        return sorted(dict.fromkeys(hits), key=self.roles.rank)

    def _untold(self, role: str, unit: Unit) -> str:
        whole = "qkv" if "qkv" in unit.parts else "kv"
        return (
            f"role '@{role}': {unit.parts[whole]} of {self.owner} computes {', '.join(whole)} in one, and the forward of its "
            f"{type(self.by_path[unit.path]).__name__} does not tell which rows are which; write '@attn.{whole}' to "
            "adapt the whole of it"
        )


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def join(path: str, name: str) -> str:
    """The path of what is called `name` at `path`."""
    return f"{path}.{name}" if path else name


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

    def walk(path: str, module: nn.Module, around: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in around or (id(module) in seen and not every_name):
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, DeltaModule):
                yield from walk(join(path, name), child, around | {id(module)})

    return walk("", backbone, frozenset())


def is_of(module: nn.Module, of: Sequence[str]) -> bool:
    """Whether a module's class, or one it derives from, has one of these names (bare or with its Python module)."""
    names = {
        name for kind in type(module).__mro__ for name in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    }
    return not names.isdisjoint(of)
