"""Weighted sums of deltas as a new delta: `combine(model, {"a": 0.7, "b": -0.3})`."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from deltakit.core import METHODS, DeltaModule, Method, Site, checked, own_modules, without_start_values
from deltakit.delta.attaching import new_delta
from deltakit.delta.handle import Delta
from deltakit.delta.planning import build, original
from deltakit.delta.running_statistics import holding_word
from deltakit.delta.using import deltas
from deltakit.errors import OptionError, StateError, no_such_delta
from deltakit.files import is_finite
from deltakit.selection import BackboneIndex


class Combination(NamedTuple):
    """The delta that holds a weighted sum, not attached, and its `error`: the norm of the difference over that of the sum."""

    delta: Delta
    error: float


@checked
def combine(
    backbone: nn.Module, weights: Mapping[str | Delta, float], *, name: str | None = None, rank: int | None = None
) -> Combination:
    """Returns the weighted sum of deltas on one backbone as a new delta, not attached. The deltas themselves do not change.

    A delta adds nothing at targets that it does not have. For LoRA the factors are concatenated, which is exact; with `rank`
    you get the best approximation of that rank. Sums of other low-rank methods are LoRAs. BitFit, MiSS and HiRA are exact.
    Methods that are not linear, such as adapters, have no sum.

    Args:
        weights: the weight of each delta, any finite number. Keys are handles, or names of attached deltas.
        name: the name of the new delta; by default one that is free when it is attached. Only with a name can it be attached
            beside its parts, to whose effect its own is added.
        rank: the rank of the sum for LoRA, at least 1; by default, at each target, the sum of the ranks there.

    Raises:
        OptionError: if there is no such delta, a weight is not finite, the rank of the sum is above a layer's size, or
            `name` is not a word without dots.
        StateError: if a delta fully trains parts of the backbone, the deltas were attached to different parts of it, or it is
            wrapped for distribution.
        TargetError: if a method is not linear.
    """
    if not weights:
        raise OptionError("combine(weights={}): expected at least one delta with its weight, such as {'name': 0.5}")
    parts = [(float(weight), _delta(original(backbone), key)) for key, weight in weights.items()]
    backbone = _root(original(backbone), [delta for _, delta in parts])
    for _, delta in parts:
        if delta.fully_trained:
            raise StateError(
                f"combine: delta {delta.name!r} {holding_word(backbone, delta.fully_trained[0])}, and only delta modules can "
                "be summed; leave it out"
            )
    modules, methods, sites = BackboneIndex(backbone), list[Method](), list[Site]()
    lost = total = 0.0
    for kind in dict.fromkeys(method.name for _, delta in parts for method in delta.methods):
        own = [(w, delta.modules_of(kind)) for w, delta in parts if any(m.name == kind for m in delta.methods)]
        paths = dict.fromkeys(path for _, there in own for path in there)
        here = {path: [(weight, part) for weight, there in own for part in there.get(path, [])] for path in paths}
        for method, at in _methods(kind, here, rank):
            with without_start_values():
                built = build(modules, method, [modules.target(path) for path in at])
            for path, module in built.items():
                terms = module.take_sum(here[path])
                lost, total = lost + terms[0], total + terms[1]
                if not all(map(is_finite, module.parameters_read())):
                    raise OptionError(
                        f"combine: at {path} the sum has values that are infinite or not a number; use smaller weights, or "
                        "leave out the delta that has such values"
                    )
                sites.append(Site(path, modules.module_at(path)[0], module, len(methods)))
            methods.append(method)
    delta = new_delta(backbone, methods, name, sites)
    return Combination(delta, math.sqrt(lost / total) if total else 0.0)


def _methods(
    kind: str, here: Mapping[str, Sequence[tuple[float, DeltaModule]]], rank: int | None
) -> list[tuple[Method, list[str]]]:
    """Returns the methods of the sum, each with the paths of its targets. Their ranks are the sums of those at the targets."""
    found: list[tuple[Method, list[str]]] = []
    for path, terms in here.items():
        method = METHODS[kind].combination([part for _, part in terms], rank)
        own = next((paths for other, paths in found if other == method), None)
        if own is None:
            found.append((method, own := []))
        own.append(path)
    return found


def _delta(backbone: nn.Module, key: str | Delta) -> Delta:
    if isinstance(key, Delta):
        if key.backbone is not backbone:
            raise OptionError(
                f"combine: delta {key.name!r} is a delta of another {type(key.backbone).__name__}; pass the model that it was "
                "attached to or loaded for"
            )
        return key
    there = {delta.name: delta for delta in deltas(backbone)}
    if key not in there:
        raise no_such_delta("combine", key, there)
    return there[key]


def _root(backbone: nn.Module, parts: Sequence[Delta]) -> nn.Module:
    """Returns the module to which deltas were attached: the backbone, or a part of it.

    Raises:
        StateError: if they were attached to several.
    """
    inside = {id(module): path for path, module in own_modules(backbone)}
    # A handle may also be one of a copy of the backbone.
    roots = {inside[id(delta.backbone)]: delta for delta in parts if id(delta.backbone) in inside}
    if len(roots) > 1:
        (path, delta), (other_path, other) = list(roots.items())[:2]
        raise StateError(
            f"combine: delta {delta.name!r} was attached to {path or 'the backbone'}, and {other.name!r} to "
            f"{other_path or 'the backbone'}; only deltas that were attached to the same module have a sum"
        )
    return next((delta.backbone for delta in roots.values()), backbone)
