"""The backbone's own values while deltas are attached."""

from collections.abc import Iterator

from torch import Tensor, nn

from deltakit.core import checked, notice_moved_buffers, records_of, roots_inside, tensors_of
from deltakit.delta.full_training import tensors_at
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
    own = dict(tensors_of(backbone))
    bare: dict[int, Tensor] = {}
    # By identity: a tied tensor has several names, and is kept under one of them.
    for root in (backbone, *dict.fromkeys(root for _, root in roots_inside(backbone).values())):
        bare |= {id(tensor): value.detach() for tensor, value in _kept_values(root)}
    with whole_state_dict(backbone):
        state = backbone.state_dict()
    return {name: bare.get(id(own[name]), value) for name, value in state.items() if name in own}


def _kept_values(root: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the tensors of a backbone that have other values while its deltas are attached, with their own values."""
    records = records_of(root)
    for record in records[:1]:
        notice_moved_buffers(root, record)
    for record in records:
        kept = record.backbone_values | record.weights_before_merge
        yield from ((tensor, kept[name]) for name, tensor in tensors_at(root, record, kept).items())
