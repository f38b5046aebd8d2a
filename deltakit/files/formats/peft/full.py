"""Reads what an adapter of PEFT has of the backbone's own tensors: modules in `modules_to_save`, and biases."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from deltakit.core import is_quantized
from deltakit.errors import CheckpointError
from deltakit.files.formats.peft.adapter import Adapter

# PEFT's wrappers around a module, and the copy that it keeps of a module in `modules_to_save`.
# Where a module in it has modules of its own, the adapter's name stands in between.
_WRAPPERS = (
    re.compile(r"\.(base_layer|modules_to_save)(?=\.)"),
    re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)"),
)
_COPY = ".original_module."


def fully_trained(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those of the tensors that replace the backbone's, by the backbone's names.

    Raises:
        CheckpointError: if the backbone has no such tensor, or it is tied to one that is not replaced.
    """
    if adapter.backbone is None:
        return {_WRAPPERS[0].sub("", name): tensor for name, tensor in tensors.items() if _COPY not in name}
    own = adapter.own
    found: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = next((name for name in (pattern.sub("", full) for pattern in _WRAPPERS) if name in own), None)
        if name is None and _COPY not in full:
            raise CheckpointError(
                f"{adapter.folder}: {full} is in no module of this backbone, and no part of a method that deltakit has; load "
                "the backbone that the adapter was trained on"
            )
        if name is not None and not (".base_layer." in full and _is_copy(tensor, own[name])):
            found[name] = tensor
    _refuse_tied(adapter, found)
    return found


def _refuse_tied(adapter: Adapter, found: Mapping[str, Tensor]) -> None:
    for name, tensor in found.items():
        held = adapter.own[name]
        tied = (
            [other for other, its in adapter.own.items() if its is held and other != name]
            if adapter.is_tied(held)
            else []
        )
        apart = next((other for other in tied if other not in found or not torch.equal(found[other], tensor)), None)
        if apart is not None:
            raise CheckpointError(
                f"{adapter.folder}: it has {name} trained in full, and in this backbone that is tied to {apart}, which would "
                "change, too; untie the two first"
            )


def _is_copy(tensor: Tensor, held: Tensor) -> bool:
    """Returns whether a tensor is the backbone's own. PEFT saves an embedding that LoRA adapts, as it may be resized."""
    if is_quantized(held) or held.is_meta:
        # Its values cannot be compared, and nobody trains them.
        return True
    return torch.equal(held.detach().cpu().to(tensor.dtype), tensor)
