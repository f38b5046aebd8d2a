"""Turns selectors into targets: the modules, parameters and feature slices that a method is attached to."""

from collections.abc import Sequence

from torch import nn

from deltakit.core import Method, Selector, Target, type_names
from deltakit.errors import RoleError
from deltakit.selection.index import BackboneIndex


def select(
    backbone: nn.Module,
    at: Selector,
    *,
    of: type[nn.Module] | str | Sequence[type[nn.Module] | str] | None = None,
    exclude: Selector | None = None,
) -> dict[str, nn.Module | nn.Parameter]:
    """Returns what a selector matches, by path: modules, or parameters if the selector names them.

    For a feature slice such as `c_attn[q]` the value is the whole fused projection.

    >>> list(select(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "*", of=nn.Linear))
    ['0']

    Args:
        at: one selector or several; a path is selected if one of them matches.
        of: only modules of these classes, given as classes or as class names.
        exclude: selectors of what is removed again.

    Raises:
        SelectorError: if a selector is malformed or matches nothing, or if `of` and `exclude` remove all matches.
        RoleError: if a role does not exist, or this backbone has no sure answer for it.
        TargetError: if the backbone is not a `torch.nn.Module`.
        OptionError: if `of` holds something else than classes and names.
    """
    index = BackboneIndex(backbone)
    paths = index.select(at, of=type_names(of), exclude=exclude)
    return {path: index.parameters[path] if path in index.parameters else index.module_at(path)[0] for path in paths}


def find_targets(index: BackboneIndex, method: Method) -> tuple[list[Target], list[Target]]:
    """Returns the targets of a method, and the default positions that it cannot serve.

    Targets come from the method's `at=`, or else from its default positions.

    Raises:
        SelectorError: if a selector is malformed or matches nothing, or if `of` and `exclude` remove all matches.
        RoleError: if a role has no sure answer on this backbone, or the backbone has no default position.
    """
    of, exclude = type_names(method.of), method.exclude
    left_out: list[Target] = []
    if method.at is not None:
        paths = index.select(method.at, of=of, exclude=exclude)
    else:
        wanted = f"the default of {method.name}"
        found, left_out = _default_paths(index, method)
        paths = index.narrow(found, of=of, exclude=exclude, wanted=wanted)
    placed = method.place(index.backbone, [index.target(path) for path in paths])
    return list({target.path: target for target in placed}.values()), left_out


def _default_paths(index: BackboneIndex, method: Method) -> tuple[list[str], list[Target]]:
    paths = method.default_targets(index.backbone)
    left_out: dict[str, Target] = {}
    if paths is None:
        paths = [path for roles in method.default_roles for path in _first_role(index, method, roles, left_out)]
    if not paths:
        asked = ["@" + role for role in dict.fromkeys(roles[0] for roles in method.default_roles)]
        wanted = ", ".join(asked) or method.default_words
        why = ""
        if left_out:
            why = (
                f" except {next(iter(left_out))}, which {method.name} cannot serve: its weight is read directly, so the "
                "layer is never called"
            )
        raise RoleError(
            f"{method.name}: no default position: {index.owner} has no {wanted}{why}; select layers by name with at=; "
            "print(dk.show(model)) lists the names"
        )
    order = {path: place for place, path in enumerate(index.by_path)}
    found = sorted(dict.fromkeys(paths), key=lambda path: order.get(path, index.roles.rank(path)))
    return found, [target for path, target in left_out.items() if path not in found]


def _first_role(index: BackboneIndex, method: Method, roles: Sequence[str], left_out: dict[str, Target]) -> list[str]:
    """For each unit the path of its first role that the method serves; for roles outside units all their paths.

    A unit none of whose roles is served goes into `left_out`.
    """
    kind, _, _ = roles[0].partition(".")
    if kind not in ("attn", "ff"):
        return list(index.roles.paths(roles[0]))
    unit_paths = set(index.roles.paths(kind))
    hits = []
    for unit in index.roles.units:
        if unit.kind != kind:
            continue
        own = {f"{kind}.{part}": path for part, path in unit.parts.items()}
        if unit.path in unit_paths:
            own[kind] = unit.path
        # Measuring the slices of a fused projection is slow; it is skipped if the unit has the wanted role anyway.
        if not own.keys() >= set(roles[:1]):
            own = {**{f"attn.{letter}": path for letter, path in index.fused.slices_of(unit).items()}, **own}
        there = [index.target(own[role]) for role in roles if role in own]
        served = next((target for target in there if method.serves(target)), None)
        if served is not None:
            hits.append(served.path)
        else:
            left_out |= {target.path: target for target in there[:1]}
    return hits
