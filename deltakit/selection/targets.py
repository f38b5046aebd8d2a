"""From selectors to targets: which modules, parameters or rows of a backbone a method gets."""

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
    """What a selector picks, by path: modules (a fused projection for its rows), or parameters where it names them.

    >>> list(select(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "*", of=nn.Linear))
    ['0']

    Raises:
        SelectorError: if a selector is malformed or picks nothing; nearest paths are named.
        RoleError: if a role has no sure answer on this backbone.
    """
    modules = BackboneIndex(backbone)
    paths = modules.select(at, of=type_names(of), exclude=exclude)
    return {
        path: modules.parameters[path] if path in modules.parameters else modules.module_at(path)[0] for path in paths
    }


def find_targets(modules: BackboneIndex, method: Method) -> tuple[list[Target], list[Target]]:
    """The targets of a method, by its selectors or by its default positions; and those that a default leaves out.

    Raises:
        SelectorError: if a selector picks nothing.
        RoleError: if the default positions are not found on this backbone.
    """
    of, exclude = type_names(method.of), method.exclude
    left_out: list[Target] = []
    if method.at is not None:
        paths = modules.select(method.at, of=of, exclude=exclude)
    else:
        wanted = f"the default of {method.name}"
        found, left_out = _default_paths(modules, method)
        paths = modules.narrow(found, of=of, exclude=exclude, wanted=wanted)
    placed = method.place(modules.backbone, [modules.target(path) for path in paths])
    return list({target.path: target for target in placed}.values()), left_out


def _default_paths(modules: BackboneIndex, method: Method) -> tuple[list[str], list[Target]]:
    paths = method.default_targets(modules.backbone)
    left_out: dict[str, Target] = {}
    if paths is None:
        paths = [path for roles in method.default_roles for path in _first_role(modules, method, roles, left_out)]
    if not paths:
        asked = ["@" + role for role in dict.fromkeys(roles[0] for roles in method.default_roles)]
        wanted = ", ".join(asked) or method.default_words
        why = ""
        if left_out:
            why = (
                f" but {next(iter(left_out))}, which {method.name} cannot serve, for its weight is read and not called"
            )
        raise RoleError(
            f"{method.name}: no default position: nothing in {modules.owner} answers {wanted}{why}; "
            f"say where with at=, for example at='**' with of=nn.Linear"
        )
    order = {path: place for place, path in enumerate(modules.by_path)}
    found = sorted(dict.fromkeys(paths), key=lambda path: order.get(path, modules.roles.rank(path)))
    return found, [target for path, target in left_out.items() if path not in found]


def _first_role(modules: BackboneIndex, method: Method, roles: Sequence[str], left_out: dict[str, Target]) -> list[str]:
    """In each unit, what answers the first role that the unit has; for roles without units, all that answer."""
    kind, _, _ = roles[0].partition(".")
    if kind not in ("attn", "ff"):
        return list(modules.roles.paths(roles[0]))
    whole = set(modules.roles.paths(kind))
    hits = []
    for unit in modules.roles.units:
        if unit.kind != kind:
            continue
        own = {f"{kind}.{part}": path for part, path in unit.parts.items()}
        if unit.path in whole:
            own[kind] = unit.path
        if not own.keys() >= set(roles[:1]):
            own = {**{f"attn.{letter}": path for letter, path in modules.fused.slices_of(unit).items()}, **own}
        there = [modules.target(own[role]) for role in roles if role in own]
        served = next((target for target in there if method.serves(target)), None)
        if served is not None:
            hits.append(served.path)
        else:
            left_out |= {target.path: target for target in there[:1]}
    return hits
