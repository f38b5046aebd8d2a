"""Finds what of a delta's backbone was replaced, removed or resized since the delta was built."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deltakit.core import Attachment, is_sharded, linear_sizes, module_at
from deltakit.delta.full_training import fully_trained_tensors
from deltakit.errors import StateError
from deltakit.injection import modules_of


def logical_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Returns the sizes of a linear layer or an embedding, however it stores its weight; None for other modules."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return linear_sizes(module)


def refuse_changed(attachment: Attachment, what: str) -> None:
    """Refuses to attach or save a delta whose targets are no longer those that it was built for.

    Args:
        what: what the user wanted to do, for the error message.

    Raises:
        StateError: if a target was replaced, removed or resized, or a fully trained tensor was.
    """
    for found in (*_changed_targets(attachment), *_changed_tensors(attachment)):
        raise StateError(
            f"{found}; {what} is not possible then: undo that change, or detach() this delta and attach a new one to the "
            "changed backbone (its load_state_dict() takes the tensors of this one's state_dict() that still fit)"
        )


def gone_modules(attachment: Attachment) -> dict[str, nn.Module]:
    """Returns the modules of a delta that are no longer in the backbone under their names, by path."""
    # A handle that `deltas` made knows only the targets that are still there.
    held = modules_of(attachment.backbone, attachment.record) | {site.owner: site.target for site in attachment.sites}
    return {path: module for path, module in held.items() if not _is_there(attachment.backbone, path, module)}


def _changed_targets(attachment: Attachment) -> Iterator[str]:
    name = attachment.record.name
    for path, module in gone_modules(attachment).items():
        yield (
            f"{path}: the {type(module).__name__} that delta {name!r} was attached to is no longer in the backbone under "
            "this name: it was replaced or removed"
        )
    for site in attachment.sites:
        first = site.module.first_sizes
        sizes, before = logical_sizes(site.target), None if first is None else first.target
        if None not in (sizes, before) and sizes != before:
            yield (
                f"{site.path}: delta {name!r} was attached to a {type(site.target).__name__} of sizes {before}, and it has "
                f"the sizes {sizes} now: it was resized (resize_token_embeddings?)"
            )


def _is_there(backbone: nn.Module, path: str, module: nn.Module) -> bool:
    there = module_at(backbone, path) or backbone
    # Engines wrap modules in place (FSDP1, checkpoint wrappers).
    return there is module or any(other is module for other in there.modules())


def _changed_tensors(attachment: Attachment) -> Iterator[str]:
    record = attachment.record
    own = fully_trained_tensors(attachment)
    for name in record.fully_trained:
        # While the delta is attached, what is saved is the resized tensor itself.
        value = record.trained_values.get(name)
        if name not in own:
            yield f"{name}: delta {record.name!r} fully trains it, and it is no longer in the backbone"
        elif value is not None and own[name].shape != value.shape and not is_part(own[name], value.shape):
            yield (
                f"{name}: delta {record.name!r} fully trains it with the shape {tuple(value.shape)}, and it has the shape "
                f"{tuple(own[name].shape)} now"
            )


def is_part(tensor: Tensor, shape: torch.Size) -> bool:
    """Returns whether a tensor may be the part of a larger one that an engine keeps in this process (FSDP1, ZeRO-3)."""
    # They keep pieces of flattened tensors, or nothing. A resized tensor has as many dimensions as before.
    engine = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_sharded(tensor) or (engine and (tensor.ndim != len(shape) or tensor.ndim == 1 or not tensor.numel()))
