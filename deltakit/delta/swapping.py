"""Two deltas of one kind exchanging their values: the tensors behind standing hooks, without a copy."""

import torch
from torch import nn

from deltakit.core import Attachment, Record, is_sharded, parameters_of
from deltakit.errors import StateError

_WHERE = ("at", "of", "exclude")


def swap(one: Attachment, other: Attachment) -> None:
    """Exchanges the values of two deltas; what is compiled stays, for nothing of the modules changes.

    Raises:
        StateError: if they differ in options, places or shapes, or one cannot be changed now.
    """
    _refuse(one.record)
    _refuse(other.record)
    pairs = _pairs(one, other)
    for mine, theirs in pairs:
        mine.data, theirs.data = theirs.data, mine.data
    # A graph made before must not go on with other values, nor a sum kept for the rows of a batch.
    torch.autograd.graph.increment_version([parameter for pair in pairs for parameter in pair])


def _refuse(record: Record) -> None:
    full = next(iter(record.fully_trained), "")
    found = {
        "is merged into the weights: unmerge() it": record.merged,
        "is in a rows() block: leave it": record.batch is not None,
        f"fully trains {full}, which it has in one place: use load_state_dict()": bool(full),
    }
    for why, so in found.items():
        if so:
            raise StateError(f"swap: delta {record.name!r} {why}")


def _pairs(one: Attachment, other: Attachment) -> list[tuple[nn.Parameter, nn.Parameter]]:
    record, another = one.record, other.record
    mine, theirs = (
        [{k: v for k, v in method.to_dict().items() if k not in _WHERE} for method in r.methods]
        for r in (record, another)
    )
    both = f"swap: deltas {record.name!r} and {another.name!r}"
    if mine != theirs:
        raise StateError(f"{both} must have the same methods with the same options; found {mine} and {theirs}")
    places = {(site.path, site.method): site.module for site in other.sites}
    pairs = []
    for site in one.sites:
        found = places.pop((site.path, site.method), None)
        if found is None:
            raise StateError(f"{both} must stand at the same places; at {site.path} there is one alone")
        named = parameters_of(found)
        for name, parameter in parameters_of(site.module).items():
            match = named.get(name)
            if match is None or not _alike(parameter, match):
                kinds = [f"{tuple(p.shape)} in {p.dtype} on {p.device}" for p in (parameter, match) if p is not None]
                raise StateError(f"{both} must have the same tensors; {site.path}.{name} is {' and '.join(kinds)}")
            if is_sharded(parameter) or is_sharded(match):
                raise StateError(f"{both}: {site.path}.{name} is spread over processes: use load_state_dict()")
            pairs.append((parameter, match))
    if places:
        raise StateError(f"{both} must stand at the same places; at {next(iter(places))[0]} there is one alone")
    return pairs


def _alike(one: nn.Parameter, other: nn.Parameter) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype and one.device == other.device
