"""Turns selectors into targets: the modules, parameters and feature slices that a method is attached to."""

from collections.abc import Sequence

from torch import nn

from deltakit.core import Method, Selector, Target, fold, linear_sizes, type_names, without_start_values
from deltakit.errors import DeltaError, RoleError
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
    left_out: list[Target] = []
    selected: list[Target] | None = None
    if method.at is not None:
        selected = [index.target(path) for path in index.select(method.at)]
    elif method.positions():
        found, left_out = _default_paths(index, method)
        selected = [index.target(path) for path in found]
    # Narrowed behind the method's own choice: of a whole encoder, Prefix takes its attention, from which `exclude` removes.
    chosen = {target.path: target for target in method.targets(index, selected)}
    wanted = f"the default of {method.name}" if method.at is None else repr(method.at)
    paths = index.narrow(list(chosen), of=type_names(method.of), exclude=method.exclude, wanted=wanted)
    return [chosen.get(path) or index.target(path) for path in paths], left_out


def _default_paths(index: BackboneIndex, method: Method) -> tuple[list[str], list[Target]]:
    left_out: dict[str, Target] = {}
    paths = [path for roles in method.positions() for path in _first_role(index, method, roles, left_out)]
    if not paths:
        asked = ", ".join("@" + role for role in dict.fromkeys(roles[0] for roles in method.positions()))
        why = ""
        if left_out:
            why = (
                f" except {next(iter(left_out))}, which {method.name} cannot serve: its weight is read directly, so the "
                "layer is never called"
            )
        raise RoleError(
            f"{method.name}: no default position: {index.owner} has no {asked}{why}; {_hint(index, method)}"
        )
    order = {path: place for place, path in enumerate(index.by_path)}
    found = sorted(dict.fromkeys(paths), key=lambda path: order.get(path, index.roles.rank(path)))
    return found, [target for path, target in left_out.items() if path not in found]


def _hint(index: BackboneIndex, method: Method) -> str:
    """What to write for `at=`: the linear layers and convolutions that the method can serve with these options, tried out."""
    served = []
    with without_start_values():
        for path, module in index.by_path.items():
            if linear_sizes(module) is None and not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                continue
            try:
                target = index.target(path)
                if method.kind_at(target) is not None:
                    method.build_at(target)
                    served.append(target.path)
            except DeltaError:
                # This one it cannot serve, such as a layer that is smaller than the rank.
                continue
    if not served:
        return (
            "no linear layer or convolution there can be served with these options either; name another target with at="
        )
    folded = fold(served)
    more = f" and {len(folded) - 3} more" if len(folded) > 3 else ""
    return f"name targets with at=, such as at={folded[0]!r}; it can serve {', '.join(folded[:3])}{more}"


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
        served = next((target for target in there if method.kind_at(target) is not None), None)
        if served is not None:
            hits.append(served.path)
        else:
            left_out |= {target.path: target for target in there[:1]}
    return hits
