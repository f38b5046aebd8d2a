"""Exchanges the values of two deltas with the same methods and targets, without copies and without touching hooks."""

import torch
from torch import Tensor

from deltakit.core import TRAINING, Attachment, DeltaModule, is_sharded, parameters_of
from deltakit.delta.running_statistics import held_of, holding_word
from deltakit.errors import StateError

_WHERE = ("at", "of", "exclude")


def swap(one: Attachment, other: Attachment) -> None:
    """Exchanges the values of two deltas. The modules stay the same, so compiled code stays valid.

    Raises:
        StateError: if the deltas differ in options, targets or tensors, or one of them is merged, in a `rows` block, sharded,
            or fully trains parts of the backbone.
    """
    _refuse(one)
    _refuse(other)
    pairs = _pairs(one, other)
    before = [(mine.data, theirs.data) for mine, theirs in pairs]
    try:
        for (mine, theirs), (my_values, their_values) in zip(pairs, before, strict=True):
            mine.data, theirs.data = their_values, my_values
    except BaseException:
        # Ctrl-C came in between: all or nothing.
        for (mine, theirs), (my_values, their_values) in zip(pairs, before, strict=True):
            mine.data, theirs.data = my_values, their_values
        raise
    # With a new version, autograd refuses backward through a graph with the old values, and caches of `rows` are computed
    # again.
    torch.autograd.graph.increment_version([parameter for pair in pairs for parameter in pair])


def _refuse(attachment: Attachment) -> None:
    record = attachment.record
    full = next(iter(held_of(attachment)), "")
    found = {
        "is merged into the weights: unmerge() it first": record.merged,
        "is in a rows() block: leave the block first": bool(record.open_blocks),
        f"{holding_word(attachment.backbone, full)}, and only delta modules can be swapped: use load_state_dict()": bool(
            full
        ),
    }
    for why, so in found.items():
        if so:
            raise StateError(f"swap: delta {record.name!r} {why}")


def _pairs(one: Attachment, other: Attachment) -> list[tuple[Tensor, Tensor]]:
    record, another = one.record, other.record
    mine, theirs = (
        [{k: v for k, v in method.to_dict().items() if k not in _WHERE} for method in r.methods]
        for r in (record, another)
    )
    both = f"swap: deltas {record.name!r} and {another.name!r}"
    if mine != theirs:
        raise StateError(f"{both} must have the same methods with the same options; found {mine} and {theirs}")
    others = {(site.path, site.method): site.module for site in other.sites}
    pairs = []
    for site in one.sites:
        found = others.pop((site.path, site.method), None)
        if found is None:
            raise StateError(f"{both} must have the same targets; only one of them has {site.path}")
        named = _tensors(found)
        for name, parameter in _tensors(site.module).items():
            match = named.get(name)
            if match is None or not _alike(parameter, match):
                kinds = [f"{tuple(p.shape)} in {p.dtype} on {p.device}" for p in (parameter, match) if p is not None]
                raise StateError(f"{both} must have the same tensors; {site.path}.{name} is {' and '.join(kinds)}")
            if is_sharded(parameter) or is_sharded(match):
                raise StateError(f"{both}: {site.path}.{name} is sharded over processes: use load_state_dict()")
            pairs.append((parameter, match))
    if others:
        raise StateError(f"{both} must have the same targets; only one of them has {next(iter(others))[0]}")
    return pairs


def _tensors(module: DeltaModule) -> dict[str, Tensor]:
    # What a method knows of its training belongs to the values that were trained.
    training = {name: buffer for name, buffer in module.named_buffers() if module.tag_of(name) == TRAINING}
    return {**parameters_of(module), **training}


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype and one.device == other.device
