"""Reads what an adapter of PEFT has of the backbone's own tensors: modules in `modules_to_save`, and biases."""

import re
from collections.abc import Mapping

from torch import Tensor

from deltakit.core import is_quantized
from deltakit.errors import CheckpointError
from deltakit.files.formats.same_values import is_own
from deltakit.files.formats.source import Source

# PEFT's wrappers around a module, and the copy that it keeps of a module in `modules_to_save`.
# Where a module in it has modules of its own, the adapter's name stands in between.
_WRAPPERS = (
    re.compile(r"\.(base_layer|modules_to_save)(?=\.)"),
    re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)"),
)
_COPY = ".original_module."


def fully_trained(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those of the tensors that replace the backbone's, by the backbone's names.

    Raises:
        CheckpointError: if the backbone has no such tensor, or it is tied to one that is not replaced.
    """
    if source.backbone is None:
        # Without a backbone it is not known whether embeddings that LoRA adapts are trained, too; PEFT always saves them.
        return {
            name: tensor for name, tensor in tensors.items() if _COPY not in name and ".base_layer.weight" not in name
        } | {
            _WRAPPERS[0].sub("", name): tensor
            for name, tensor in tensors.items()
            if ".base_layer.bias" in name or ".modules_to_save." in name
        }
    own = source.own
    found: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = next((name for name in (pattern.sub("", full) for pattern in _WRAPPERS) if name in own), None)
        if name is None and _COPY not in full:
            raise CheckpointError(
                f"{source.folder}: {full} is in no module of this backbone, and no part of a method that deltakit has; load "
                "the backbone that the adapter was trained on"
            )
        if name is not None and not _is_copy(source, full, tensor, own[name]):
            found[name] = tensor
    source.refuse_tied(found)
    return found


def _is_copy(source: Source, name: str, tensor: Tensor, held: Tensor) -> bool:
    """Returns whether a tensor is one of the backbone that PEFT saved beside the adapter.

    It saves embeddings that are adapted, or that were resized, and whatever `save_embedding_layers` asks for.

    Raises:
        CheckpointError: if that cannot be seen.
    """
    inside = ".base_layer." in name
    if is_quantized(held):
        # Nobody trains it.
        return inside
    if inside and held.is_meta and not tensor.is_meta:
        raise CheckpointError(
            f"{source.folder}: {name} may be the backbone's own, whose weights are not in memory here; load the adapter onto "
            "the model with its weights, and save it from there"
        )
    return is_own(tensor, held) or (inside and tensor.is_meta)
