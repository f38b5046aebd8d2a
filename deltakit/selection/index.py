"""The index of a backbone: its modules and parameters by path, without those of deltas, and what follows from them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import nn

from deltakit.core import (
    Inferred,
    Selector,
    Target,
    above,
    held_at,
    is_compute_dtype,
    is_of,
    is_slice,
    join,
    names_by_id,
    own_children,
    own_modules,
    split_slice,
)
from deltakit.errors import RoleError, SelectorError, TargetError
from deltakit.selection.fused_qkv import FusedProjections
from deltakit.selection.grammar import select_paths
from deltakit.selection.role_inference.infer import infer_roles
from deltakit.selection.role_inference.role_map import RoleMap, Unit
from deltakit.selection.weight_reads import WeightReads


@dataclass
class BackboneIndex:
    """Finds the targets of selectors on one backbone, and answers what is known about each path.

    A path names a module, a parameter, or a feature slice of a fused projection such as `h.0.attn.c_attn[q]`.
    `by_path` holds every module under every name that it has.

    Raises:
        TargetError: if the backbone is not a `torch.nn.Module`.
    """

    backbone: nn.Module
    by_path: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, nn.Module):
            raise TargetError(
                f"backbone: expected a torch.nn.Module, found {type(self.backbone).__name__}; pass the model itself"
            )
        self.by_path = dict(own_modules(self.backbone, every_name=True))
        for path, module in self.by_path.items():
            _refuse_nameless(path, module)

    @property
    def owner(self) -> str:
        """The class name of the backbone, for messages."""
        return type(self.backbone).__name__

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """All paths of each module instance, by the instance's id."""
        return names_by_id(self.by_path.items())

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by path; a tied parameter appears under each of its names."""
        return {
            join(path, name): parameter
            for path, module in self.by_path.items()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }

    @cached_property
    def parameter_names(self) -> dict[int, list[str]]:
        """The names of each parameter, by its id. A tied parameter has one name for each module that holds it."""
        return names_by_id(
            (join(path, name), parameter)
            for path, module in self.by_path.items()
            if self.names[id(module)][0] == path
            for name, parameter in module._parameters.items()
            if parameter is not None
        )

    @cached_property
    def roles(self) -> RoleMap:
        """The roles inferred from the backbone's structure."""
        unique = {path: module for path, module in self.by_path.items() if self.names[id(module)][0] == path}
        return infer_roles(self.backbone, unique)

    @cached_property
    def fused(self) -> FusedProjections:
        """The fused projections and their feature slices."""
        return FusedProjections(self.by_path, self.roles.units)

    @cached_property
    def weight_reads(self) -> WeightReads:
        """The weights that other modules read directly, without calling the layer that holds them."""
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
        if path in self.by_path or path in self.parameters:
            return True
        base, letter = self.split(path)
        known = base in self.by_path or base in self.parameters
        return bool(letter) and known and self.fused.slice_at(base, letter) is not None

    def split(self, path: str) -> tuple[str, str]:
        """Returns a path without its feature slice, and the name of the slice; a full path that exists has none."""
        return (path, "") if path in self.by_path else split_slice(path, self.parameters)

    def module_at(self, path: str) -> tuple[nn.Module, str]:
        """Returns the module of a path, and the parameter's name in it, or "" if the path is not of a parameter."""
        return held_at(self.by_path, path)

    def first_name(self, path: str) -> str:
        """Returns the first of all paths under which this module or parameter is registered."""
        base, letter = self.split(path)
        if base in self.by_path:
            first = self.names[id(self.by_path[base])][0]
        else:
            first = self.parameter_names[id(self.parameters[base])][0]
        return f"{first}[{letter}]" if letter else first

    def target(self, path: str) -> Target:
        """Returns the target at a path; its own path is the first one of its module instance."""
        first = self.first_name(path)
        base, letter = self.split(first)
        module, parameter = self.module_at(first)
        owner = base.rpartition(".")[0] if parameter else base
        tensor = module._parameters.get(parameter or "weight")
        return Target(
            first,
            module,
            tuple(self.names[id(module)][1:]),
            parameter=parameter,
            feature_slice=self.fused.slice_at(base, letter) if letter else None,
            weight_read=self.weight_reads.of(owner, parameter),
            tied=tuple(self.weight_reads.other_names(owner, parameter or "weight")) if tensor is not None else (),
            inferred=partial(self._inferred, first, owner),
            # Looked up only if the weight itself does not say it, because each look-up walks the modules around.
            around=None if tensor is not None and is_compute_dtype(tensor.dtype) else self._dtype_around(owner),
        )

    def _dtype_around(self, path: str) -> torch.dtype | None:
        """The dtype of the nearest floating-point parameter, in the module itself or in a module around it."""
        near = (own_modules(self.by_path[name]) for name in above(path))
        dtypes = (p.dtype for found in near for _, m in found for p in m._parameters.values() if p is not None)
        return next(filter(is_compute_dtype, dtypes), None)

    def _inferred(self, path: str, owner: str) -> Inferred:
        width = next((self._widths[name] for name in above(owner) if name in self._widths), None)
        if width is None and owner:
            # A part around a single unit, such as the layer of T5 with the residual and the norm of its cross-attention; or a
            # block, which gives the hidden states to the next one in the size that all of its parts have.
            inside = [own for name, own in self._widths.items() if name.startswith(f"{owner}.")]
            alone = len(inside) == 1 or (owner in self.roles.blocks and len(set(inside)) == 1)
            width = inside[0] if alone else None
        return Inferred(width, self._roles_of.get(path, frozenset()))

    def select(self, at: Selector, *, of: Sequence[str] | None = None, exclude: Selector | None = None) -> list[str]:
        """Returns the selected paths, each module instance once.

        Raises:
            SelectorError: if a selector is malformed or matches nothing, or if `of` and `exclude` remove all matches.
            RoleError: if a role does not exist, or this backbone has no sure answer for it.
        """
        return self.narrow(self._paths(at), of=of, exclude=exclude, wanted=repr(at))

    def narrow(
        self,
        paths: Sequence[str],
        *,
        of: Sequence[str] | None,
        exclude: Selector | None,
        wanted: str,
        inside: bool = False,
    ) -> list[str]:
        """Returns the paths that are of the types `of` and that `exclude` does not match, each module instance once.

        Args:
            wanted: the description of the paths for error messages.
            inside: whether to exclude what is inside an excluded module, too.

        Raises:
            SelectorError: if an entry of `exclude` is malformed or removes nothing, or if no path is left.
            RoleError: if `exclude` has a role that does not exist or has no sure answer here.
        """
        hits = list(paths)
        for entry in (exclude,) if isinstance(exclude, str) else exclude or ():
            left = self._without(hits, set(self._paths(entry)), inside)
            if hits and len(left) == len(hits):
                raise SelectorError(
                    f"exclude={entry!r} removes none of the {len(hits)} targets that {wanted} selects in {self.owner}, such "
                    f"as {hits[0]}; omit it, or exclude what is below it with '{entry}/**'"
                )
            hits = left
        if of is not None:
            hits = [path for path in hits if not self.module_at(path)[1] and is_of(self.module_at(path)[0], of)]
        if not hits:
            given = [f"{name}={value!r}" for name, value in (("of", of), ("exclude", exclude)) if value is not None]
            if not given:
                raise SelectorError(f"{wanted} selects nothing in {self.owner}; name targets with at=")
            raise SelectorError(
                f"{wanted} selects {len(paths)} targets in {self.owner}, and {' and '.join(given)} leaves none of them; omit "
                "that, or select other targets"
            )
        return list(dict.fromkeys(map(self.first_name, hits)))

    def _without(self, hits: Sequence[str], excluded: set[str], inside: bool) -> list[str]:
        """The hits of which neither the path, nor the fused projection, nor the module that holds it is excluded.

        With `inside` no module around it may be excluded either.
        """
        left = []
        for path in hits:
            base, _ = self.split(path)
            owner = base if base in self.by_path else base.rpartition(".")[0]
            if excluded.isdisjoint((path, base, owner, *(above(owner) if inside else ()))):
                left.append(path)
        return left

    def _paths(self, at: Selector) -> list[str]:
        return select_paths(at, self.by_path, self.role, owner=self.owner, explicit=self._explicit)

    def _explicit(self, slices: bool) -> Collection[str]:
        """The paths that only an explicit selector matches: parameters, or the feature slices of fused projections."""
        if not slices:
            return self.parameters
        fused = [path for unit in self.roles.units for path in self.fused.slices_of(unit).values()]
        return fused + [path for unit in self.roles.units for path in unit.parts.values() if "[" in path]

    def role(self, role: str) -> Sequence[str]:
        """Returns the paths that have a role, including feature slices of fused projections.

        Raises:
            RoleError: if there is no such role, or the layout of a fused projection cannot be determined.
        """
        kind, _, part = role.partition(".")
        hits = list(self.roles.paths(role))
        if kind == "attn" and part in ("q", "k", "v"):
            for unit in self.roles.units:
                if unit.kind != "attn" or part in unit.parts or not {"qkv", "kv"} & unit.parts.keys():
                    continue
                slices = self.fused.slices_of(unit)
                if part not in slices:
                    raise RoleError(self._unknown_layout(role, unit))
                hits.append(slices[part])
        return sorted(dict.fromkeys(hits), key=self.roles.rank)

    def _unknown_layout(self, role: str, unit: Unit) -> str:
        part = "qkv" if "qkv" in unit.parts else "kv"
        return (
            f"role '@{role}': {unit.parts[part]} of {self.owner} computes {', '.join(part)} in one projection, and the "
            f"forward of its {type(self.by_path[unit.path]).__name__} does not show which features are which; use "
            f"'@attn.{part}' to select the whole projection"
        )


def _refuse_nameless(path: str, module: nn.Module) -> None:
    """Refuses names that torch itself refuses, but that can be written into its dictionaries: they make paths ambiguous.

    Raises:
        TargetError: if a module or parameter has such a name.
    """
    names = [name for name, _ in own_children(module)] if module._modules else []
    for name in (*names, *module._parameters):
        if not name or "." in name or (is_slice(name) and name in module._parameters):
            raise TargetError(
                f"{path or 'the backbone'}: it holds a module or parameter named {name!r}, which cannot be part of a path; "
                "rename it to a name that is not empty and has no dot (a parameter: not in brackets either)"
            )
