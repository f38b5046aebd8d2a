"""`combine(model, {"a": 0.7, "b": -0.3})`: weighted sums of deltas as a delta of its own."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from deltakit.core import METHODS, Method, Site
from deltakit.delta.attaching import new_delta
from deltakit.delta.handle import Delta, deltas
from deltakit.delta.planning import build, original
from deltakit.errors import OptionError, StateError, no_such_delta
from deltakit.selection import BackboneIndex


class Combination(NamedTuple):
    """The delta that holds a weighted sum, not attached; and how far it is from the sum, as a share of the sum's norm."""

    delta: Delta
    error: float


def combine(
    backbone: nn.Module, weights: Mapping[str | Delta, float], *, name: str | None = None, rank: int | None = None
) -> Combination:
    """The weighted sum of deltas on one backbone as a new delta, not attached; the deltas themselves stay as they are.

    Where a delta has nothing at a place it adds nothing there. LoRA: the ranks side by side, which is exact, or the nearest
    of rank `rank`, by its singular values. BitFit: exact. Other methods are not linear and have no sum.

    Args:
        weights: what each delta counts, by its handle or, of an attached one, its name; any finite number.

    Raises:
        OptionError: if there is no such delta, or a weight is not finite, or the ranks together exceed a layer's size.
        StateError: if a delta trains parts of the backbone whole.
        TargetError: if a method is not linear.
    """
    backbone = original(backbone)
    parts = [(float(weight), _delta(backbone, key)) for key, weight in weights.items()]
    if not parts or not all(math.isfinite(weight) for weight, _ in parts):
        raise OptionError(f"combine({weights!r}): expected at least one delta, each with a finite number")
    for _, delta in parts:
        if delta.fully_trained:
            raise StateError(
                f"combine: delta {delta.name!r} fully trains {delta.fully_trained[0]}; only delta modules can be summed"
            )
    modules, methods, sites = BackboneIndex(backbone), list[Method](), list[Site]()
    lost = whole = 0.0
    for kind in dict.fromkeys(method.name for _, delta in parts for method in delta.methods):
        own = [(weight, delta.modules_of(kind)) for weight, delta in parts]
        method = METHODS[kind].combination([m for _, delta in parts for m in delta.methods if m.name == kind], rank)
        paths = list(dict.fromkeys(path for _, there in own for path in there))
        for path, module in build(modules, method, [modules.target(path) for path in paths]).items():
            here = [(weight, part) for weight, there in own for part in there.get(path, [])]
            terms = module.take_sum(here)
            lost, whole = lost + terms[0], whole + terms[1]
            sites.append(Site(path, modules.module_at(path)[0], module, len(methods)))
        methods.append(method)
    delta = new_delta(backbone, methods, name, sites)
    return Combination(delta, math.sqrt(lost / whole) if whole else 0.0)


def _delta(backbone: nn.Module, key: str | Delta) -> Delta:
    if isinstance(key, Delta):
        return key
    there = {delta.name: delta for delta in deltas(backbone)}
    if key not in there:
        raise no_such_delta("combine", key, there)
    return there[key]
