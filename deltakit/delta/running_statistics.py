"""What a delta holds of the backbone besides its modules: the words for it, and loading it from a state dict."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltakit.core import Attachment, notice_moved_buffers, own_modules, tensors_in, tensors_of
from deltakit.delta.full_training import refuse_taken


def held_of(attachment: Attachment) -> list[str]:
    """Returns the names of the fully trained tensors and the running statistics of a delta, those of the last forward too."""
    if attachment.attached:
        notice_moved_buffers(attachment.backbone, attachment.record)
    return attachment.record.fully_trained


def holding_word(backbone: nn.Module, name: str) -> str:
    """Returns what a delta does with a tensor of the backbone, for error messages."""
    trains = isinstance(dict(tensors_of(backbone)).get(name), nn.Parameter)
    return f"fully trains {name}" if trains else f"has running statistics of its own, {name}"


def fitting(attachment: Attachment, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that a state dict of a delta must have, given the running statistics that it has.

    Statistics move in training, so an earlier state dict of the same delta may lack them, and a new delta has none yet.

    Args:
        expected: the tensors that the delta has.

    Raises:
        StateError: if another attached delta has the same statistics.
    """
    record, here = attachment.record, _statistics(attachment)
    kept = {name: value for name, value in expected.items() if name in state or name not in record.moved}
    new = {name: here[name] for name in state if name in here and name not in expected}
    if attachment.attached:
        refuse_taken(attachment, list(new))
    return kept | new


@torch.no_grad()
def fit(attachment: Attachment, state: Mapping[str, Tensor]) -> None:
    """Makes the running statistics of a state dict those of the delta, and drops the others. Their values are not loaded."""
    record, here = attachment.record, _statistics(attachment)
    for name in record.moved - state.keys():
        own = record.backbone_values.pop(name, None)
        if own is not None:
            here[name].copy_(own)
        record.trained_values.pop(name, None)
        record.moved.discard(name)
    held = record.backbone_values if attachment.attached and record.active else record.trained_values
    for name in state.keys() & here.keys() - set(record.fully_trained):
        held[name] = here[name].detach().clone()
        record.moved.add(name)


def _statistics(attachment: Attachment) -> dict[str, Tensor]:
    # Most modules have no buffers, and a load asks twice.
    modules = [(path, module) for path, module in own_modules(attachment.backbone, every_name=True) if module._buffers]
    return {
        name: own
        for path, module in modules
        for name, own in tensors_in(path, module)
        if not isinstance(own, nn.Parameter)
    }
