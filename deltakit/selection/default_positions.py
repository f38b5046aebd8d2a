"""The default positions of a method on a backbone, and what it takes where the backbone has none of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deltakit.core import Method, fold
from deltakit.errors import DeltaError, OptionError, RoleError
from deltakit.selection.index import BackboneIndex
from deltakit.selection.layers import takes_layers, trunk_layers
from deltakit.selection.role_inference.role_map import Unit
from deltakit.selection.served import advice, refusals

_UNKNOWN_LAYOUT = "its forward does not show which of its features are queries, keys and values"


@dataclass
class Found:
    """The paths that a method is attached to.

    `left_out` are paths at default positions, or in a selected container, that the method cannot serve, each with the reason.
    `note` says what is unusual about the choice; "" if nothing is.
    """

    paths: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    note: str = ""


def default_positions(index: BackboneIndex, method: Method) -> Found:
    """Returns the default positions of a method.

    Raises:
        RoleError: if the backbone has no default position, and nothing that can take its place.
        OptionError: if there are such layers, and only an option of the method does not fit them.
    """
    found, fused = Found(), list[str]()
    paths = [path for roles in method.positions() for path in _with_first_role(index, method, roles, found, fused)]
    if not paths:
        return _instead(index, method, found)
    order = {path: place for place, path in enumerate(index.by_path)}
    found.paths = sorted(dict.fromkeys(paths), key=lambda path: order.get(path, index.roles.rank(path)))
    found.left_out = {path: why for path, why in found.left_out.items() if path not in found.paths}
    if fused:
        found.note = f"the full projection {', '.join(fold(dict.fromkeys(fused)))}: {_UNKNOWN_LAYOUT}"
    return found


def _with_first_role(
    index: BackboneIndex, method: Method, roles: Sequence[str], found: Found, fused: list[str]
) -> list[str]:
    """For each unit the path of its first role that the method serves; for roles outside units all their paths."""
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
        slices = {} if own.keys() >= set(roles[:1]) else index.fused.slices_of(unit)
        own = {**{f"attn.{letter}": path for letter, path in slices.items()}, **own}
        there = [index.target(own[role]) for role in roles if role in own]
        served = next((target for target in there if method.kind_at(target) is not None), None)
        unknown = _unknown_layout(unit, roles[0], own)
        if served is not None:
            hits.append(served.path)
            fused += [unknown] if served.path == unknown else []
        elif there:
            found.left_out[there[0].path] = "weight read directly"
        elif unknown:
            found.left_out[unknown] = _UNKNOWN_LAYOUT
    return hits


def _unknown_layout(unit: Unit, wanted: str, own: Mapping[str, str]) -> str:
    """The unit's fused projection if it computes the wanted part and its slices are unknown; "" otherwise."""
    part = wanted.removeprefix("attn.")
    fused = unit.parts.get("qkv", "") if part == "q" else unit.parts.get("qkv") or unit.parts.get("kv", "")
    return fused if part in ("q", "k", "v") and wanted not in own else ""


def _instead(index: BackboneIndex, method: Method, found: Found) -> Found:
    """The outputs of blocks, or the layers in them, on a backbone that has none of the default positions."""
    *others, last = ["@" + role for role in dict.fromkeys(roles[0] for roles in method.positions())]
    lacking = f"{index.owner} has no {', '.join(others)}{' or ' if others else ''}{last}"
    if found.left_out:
        path, why = next(iter(found.left_out.items()))
        lacking += f" except {path}, which {method.name} cannot serve ({why})"
    if index.roles.blocks and not takes_layers(method):
        candidates, what = list(index.roles.blocks), "the outputs of its blocks"
    else:
        candidates, what = trunk_layers(index, method)
    tried = refusals(index, method, candidates)
    for path, (why, _) in tried.items():
        if why:
            found.left_out[path] = why
        else:
            found.paths.append(path)
    if not found.paths:
        raise _nowhere(index, method, lacking, [error for _, error in tried.values() if isinstance(error, OptionError)])
    found.note = f"fallback: {lacking}, so these are {what}; choose others with at="
    return found


def _nowhere(index: BackboneIndex, method: Method, lacking: str, misfits: Sequence[OptionError]) -> DeltaError:
    """The error for a backbone on which no position is left. `misfits` say which options would help."""
    instead = advice(index, method)
    if misfits and not instead.selectors:
        return misfits[0]
    text = instead.text or f"{method.name} cannot serve any of its layers and parameters; use another method"
    options = f"{misfits[0]}; or " if misfits else ""
    return RoleError(f"{method.name}: no default position: {lacking}; {options}{text}")
