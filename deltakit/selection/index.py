"""The modules and parameters of a backbone by path, the deltas' own left out, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from deltakit.core import Selector, Target, above, held_at, is_compute_dtype, is_of, join, own_modules, split_slice
from deltakit.errors import RoleError, SelectorError, TargetError
from deltakit.selection.fused_qkv import Fused
from deltakit.selection.grammar import select_paths
from deltakit.selection.role_inference.infer import infer_roles
from deltakit.selection.role_inference.role_map import RoleMap, Unit
from deltakit.selection.weight_reads import WeightReads


@dataclass
class BackboneIndex:
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
    def fused(self) -> Fused:
        return Fused(self.by_path, self.roles.units)

    @cached_property
    def weight_reads(self) -> WeightReads:
        return WeightReads(self.by_path, self.parameter_names)

    @cached_property
    def _roles_of(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for unit in self.roles.units:
            for part, path in unit.parts.items():
                found.setdefault(path, set()).add(f"{unit.kind}.{part}")
        return {path: frozenset(roles) for path, roles in found.items()}

    @cached_property
    def _widths(self) -> dict[str, int | None]:
        return {unit.path: unit.width for unit in self.roles.units}

    def __contains__(self, path: str) -> bool:
        base, letter = split_slice(path)
        return (base in self.by_path or base in self.parameters) and (
            not letter or self.fused.slice_at(base, letter) is not None
        )

    def module_at(self, path: str) -> tuple[nn.Module, str]:
        """The module of a path, and the name of the parameter in it if the path is that of a parameter."""
        return held_at(self.by_path, path)

    def first_name(self, path: str) -> str:
        """The path by which the same module or parameter is known: the first of all that it has."""
        base, letter = split_slice(path)
        if base in self.by_path:
            first = self.names[id(self.by_path[base])][0]
        else:
            first = self.parameter_names[id(self.parameters[base])][0]
        return f"{first}[{letter}]" if letter else first

    def target(self, path: str) -> Target:
        """The target at a path, under the first path of its module instance."""
        first = self.first_name(path)
        base, letter = split_slice(first)
        module, parameter = self.module_at(first)
        owner = base.rpartition(".")[0] if parameter else base
        tensor = module._parameters.get(parameter or "weight")
        return Target(
            first,
            module,
            tuple(self.names[id(module)][1:]),
            self._width(owner),
            parameter=parameter,
            feature_slice=self.fused.slice_at(base, letter) if letter else None,
            weight_read=self.weight_reads.of(owner, parameter),
            tied=tuple(self.weight_reads.other_names(owner, parameter or "weight")) if tensor is not None else (),
            # Asked only where the weight does not tell: it is a walk for each target.
            roles=self._roles_of.get(first, frozenset()),
            around=None if tensor is not None and is_compute_dtype(tensor.dtype) else self._dtype_around(owner),
        )

    def _dtype_around(self, path: str) -> torch.dtype | None:
        """The dtype of the nearest parameters that are in floating point: in the module itself, or in those around it."""
        near = (own_modules(self.by_path[name]) for name in above(path))
        dtypes = (p.dtype for found in near for _, m in found for p in m._parameters.values() if p is not None)
        return next(filter(is_compute_dtype, dtypes), None)

    def _width(self, path: str) -> int | None:
        return next((self._widths[name] for name in above(path) if name in self._widths), None)

    def select(self, at: Selector, *, of: Sequence[str] | None = None, exclude: Selector | None = None) -> list[str]:
        """The selected paths, each module instance once. Raises `SelectorError` where nothing is left."""
        return self.narrow(self._paths(at), of=of, exclude=exclude, wanted=repr(at))

    def narrow(
        self, paths: Sequence[str], *, of: Sequence[str] | None, exclude: Selector | None, wanted: str
    ) -> list[str]:
        """Those of the paths that `of` and `exclude` leave, each module instance once."""
        hits = list(paths)
        for entry in (exclude,) if isinstance(exclude, str) else exclude or ():
            left = self._without(hits, set(self._paths(entry)))
            if hits and len(left) == len(hits):
                raise SelectorError(
                    f"exclude={entry!r} takes nothing out of the {len(hits)} that {wanted} selects in {self.owner}, such as "
                    f"{hits[0]}; leave it away, or write what is to be left out ('{entry}/**' for all below)"
                )
            hits = left
        if of is not None:
            hits = [path for path in hits if not self.module_at(path)[1] and is_of(self.module_at(path)[0], of)]
        if not hits:
            raise SelectorError(
                f"{wanted} selects {len(paths)} modules of {self.owner}, but of={of!r} and exclude={exclude!r} "
                "leave none of them"
            )
        return list(dict.fromkeys(map(self.first_name, hits)))

    def _without(self, hits: Sequence[str], out: set[str]) -> list[str]:
        """The hits that are not out, nor in a fused projection that is, nor a parameter of a module that is."""
        left = []
        for path in hits:
            base, _ = split_slice(path)
            owner = base if base in self.by_path else base.rpartition(".")[0]
            if out.isdisjoint((path, base, owner)):
                left.append(path)
        return left

    def _paths(self, at: Selector) -> list[str]:
        return select_paths(at, list(self.by_path), self.role, owner=self.owner, named=self._named)

    def _named(self, rows: bool) -> list[str]:
        """What is picked only where a selector writes it out: parameters, and the rows of fused projections."""
        if not rows:
            return list(self.parameters)
        fused = [path for unit in self.roles.units for path in self.fused.slices_of(unit).values()]
        return fused + [path for unit in self.roles.units for path in unit.parts.values() if "[" in path]

    def role(self, role: str) -> Sequence[str]:
        """The paths that answer a role, those of rows of fused projections with them.

        Raises:
            RoleError: if there is no such role, or it cannot be told which rows of a fused projection answer.
        """
        kind, _, part = role.partition(".")
        hits = list(self.roles.paths(role))
        if kind == "attn" and part in ("q", "k", "v"):
            for unit in self.roles.units:
                if unit.kind != "attn" or part in unit.parts or not {"qkv", "kv"} & unit.parts.keys():
                    continue
                rows = self.fused.slices_of(unit)
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
