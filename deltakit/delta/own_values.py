"""State dicts of a backbone with deltas, without their keys: as it was before, and with the deltas in the weights."""

from collections.abc import Iterator

from torch import Tensor, nn

from deltakit.core import attachments_of, checked, notice_moved_buffers, records_of, roots_inside, tensors_of
from deltakit.delta.full_training import tensors_at
from deltakit.delta.merging import add_merged
from deltakit.errors import StateError
from deltakit.injection import records_around, whole_state_dict


@checked
def base_state_dict(backbone: nn.Module) -> dict[str, Tensor]:
    """Returns the backbone's state dict as it would be if nothing were attached.

    It has no keys of deltas, the weights are those from before a merge, and fully trained tensors and running statistics have
    the backbone's own values: the trained ones are in the delta's file.

    Raises:
        StateError: if this is a part of the model that a delta is attached to, and the delta is merged into or fully trains
            something here.
    """
    for record in records_around(backbone):
        if record.backbone_values or record.weights_before_merge:
            # The names in the record are those of the whole model.
            raise StateError(
                f"base_state_dict: this {type(backbone).__name__} has parts of delta {record.name!r}, which is attached to a "
                "model around it and keeps the own values; call it with that model"
            )
    known = {name for name, _ in tensors_of(backbone)}
    own = own_values(backbone, backbone, *dict.fromkeys(root for _, root in roots_inside(backbone).values()))
    with whole_state_dict():
        state = backbone.state_dict()
    return {name: own.get(name, value) for name, value in state.items() if name in known}


@checked
def merged_state_dict(backbone: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of the plain model with all active deltas in its weights. The backbone is not changed.

    It has the backbone's own keys, and loads strictly into a model without deltas. Fully trained tensors and running
    statistics have the values of the active deltas. Deltas that are not active are left out.

    Raises:
        StateError: if a weight is tied, offloaded, fully trained by another delta or has another delta merged into it.
        TargetError: if a method cannot be merged, a weight is computed from others (weight norm), or a weight is quantized.
    """
    own = dict(tensors_of(backbone))
    sums: dict[int, Tensor] = {}
    for attachment in attachments_of(backbone):
        if attachment.record.live:
            add_merged(attachment, sums)
    with whole_state_dict():
        state = backbone.state_dict()
    return {name: sums.get(id(own[name]), value) for name, value in state.items() if name in own}


def own_values(module: nn.Module, *roots: nn.Module, merged: bool = True) -> dict[str, Tensor]:
    """Returns the backbone's own values of the tensors in a module that have others while deltas are attached.

    Args:
        roots: the modules that the deltas are attached to.
        merged: whether to return those of merged deltas, too.

    Returns:
        The values by the names that the tensors have in the module. A tied tensor has several.
    """
    # By identity: a tied tensor is kept under one of its names.
    found = {id(tensor): value.detach() for root in roots for tensor, value in _kept(root, merged)}
    return {name: found[id(tensor)] for name, tensor in tensors_of(module) if id(tensor) in found}


def _kept(root: nn.Module, merged: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the tensors of a backbone that have other values while its deltas are attached, with their own values."""
    records = records_of(root)
    for record in records[:1]:
        notice_moved_buffers(root, record)
    for record in records:
        if record.merged and not merged:
            continue
        kept = record.backbone_values | record.weights_before_merge
        yield from ((tensor, kept[name]) for name, tensor in tensors_at(root, record, kept).items())
