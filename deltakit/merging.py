"""Merging a delta into the backbone's weights, and exactly out of them again from a saved copy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltakit.errors import StateError, TargetError
from deltakit.paths import join
from deltakit.shapes import wide
from deltakit.state import Record, Site, records_of, tensors_of


@torch.no_grad()
def merge(backbone: nn.Module, record: Record, sites: Sequence[Site]) -> None:
    """Adds the weight updates of a delta to the weights, in float32 or wider, and keeps the weights as they were.

    Subtracting instead of keeping a copy would leave one in eight bfloat16 weights changed (measured).

    Raises:
        TargetError: if a method is no change of weights, or the weights are not in floating point.
        StateError: if a weight is tied, or another delta is merged into it.
    """
    parameters = dict(tensors_of(backbone))
    updates: dict[str, Tensor] = {}
    together: set[str] = set()
    for site in sites:
        for name, update in _update(site).items():
            updates[name] = updates[name] + update if name in updates else update
            reading = site.module.reading
            tied = reading is not None and any(other.owner != reading.owner for other in reading.also)
            together |= {name} if tied else set()
    _check(backbone, record, updates, parameters, together)
    merged = {name: (wide(parameters[name]) + update).to(parameters[name].dtype) for name, update in updates.items()}
    record.merged = {name: parameters[name].detach().clone() for name in updates}
    for name, value in merged.items():
        parameters[name].copy_(value)


@torch.no_grad()
def unmerge(backbone: nn.Module, record: Record) -> None:
    """Puts back the weights as they were before merging, bit for bit."""
    parameters = dict(tensors_of(backbone))
    for name, value in record.merged.items():
        parameters[name].copy_(value)
    record.merged = {}


def _update(site: Site) -> dict[str, Tensor]:
    try:
        update = site.module.weight_update(site.target)
    except TargetError as error:
        raise TargetError(f"{site.path}: {error}") from error
    return {join(site.owner, name): value for name, value in update.items()}


def _check(
    backbone: nn.Module,
    record: Record,
    updates: dict[str, Tensor],
    parameters: dict[str, Tensor],
    together: set[str],
) -> None:
    for name, update in updates.items():
        if name not in parameters:
            raise TargetError(
                f"{name}: expected a parameter to merge into, found none of that name (is it computed from others, as by "
                "weight_norm?); leave the delta attached"
            )
        weight = parameters[name]
        plain = type(weight) in (Tensor, nn.Parameter)
        found = f"{weight.dtype} {tuple(weight.shape)}" + ("" if plain else f" as {type(weight).__name__}")
        if not plain or not torch.is_floating_point(weight) or weight.shape != update.shape:
            raise TargetError(
                f"{name}: expected a floating-point weight of shape {tuple(update.shape)} to merge into, found "
                f"{found}; leave the delta attached"
            )
        tied = [other for other, tensor in parameters.items() if tensor is weight and other != name]
        # One update of a tied weight, in all places that hold it, is what the delta does while it is attached.
        if tied and name not in together:
            raise StateError(f"{name} is tied to {tied[0]}: merging would change both; leave the delta attached")
    for other in records_of(backbone):
        both = sorted(other.merged.keys() & updates.keys())
        if both and other is not record:
            raise StateError(f"{both[0]}: delta {other.name!r} is merged into it; unmerge {other.name!r} first")
