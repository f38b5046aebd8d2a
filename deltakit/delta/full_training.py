"""Full training of backbone modules (`train=`): their values, and which of the backbone's parameters require gradients.

The backbone must be bit-exact after detaching, so its own values are kept while a delta is attached, and the trained values
while it is detached.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from deltakit.core import (
    Attachment,
    GradLedger,
    Record,
    above,
    is_compute_dtype,
    linear_sizes,
    name_of,
    normal_tensors,
    notice_moved_buffers,
    own_modules,
    own_parameters,
    parent_of,
    records_of,
    tensors_in,
    tensors_of,
)
from deltakit.errors import StateError, warn
from deltakit.injection import holder_of, modules_of


def full_training_names(backbone: nn.Module, paths: list[str]) -> list[str]:
    """Returns the names of all parameters and saved buffers at and below these paths, which may be those of parameters.

    Raises:
        StateError: if there are none, or one of them is tied to a parameter outside (which would be trained, too),
            quantized or offloaded.
    """
    chosen = set(paths)
    inside: dict[str, Tensor] = {}
    held: set[int] = set()
    outside: dict[int, list[tuple[int, str]]] = {}
    # Under every name: a tied weight is found only by its second name.
    for path, module in own_modules(backbone, every_name=True):
        is_inside = not chosen.isdisjoint(above(path))
        for name, tensor in tensors_in(path, module):
            if is_inside or name in chosen:
                _refuse_quantized(path, module)
                _refuse_offloaded(name, tensor, module)
                _refuse_inference(name, tensor)
                inside[name] = tensor
                held.add(id(module))
            else:
                outside.setdefault(id(tensor), []).append((id(module), name))
    for name, tensor in inside.items():
        # The module itself may be registered under two paths. Its second path holds the same parameter, not a tied one.
        others = [other for module, other in outside.get(id(tensor), []) if module not in held]
        if others:
            raise StateError(
                f"train: {name} is tied to {others[0]}, which would be trained with it; select both in train=, "
                "or untie them first"
            )
    if not inside:
        raise StateError(f"train: no parameters in {', '.join(paths)}; select modules that have parameters")
    return list(inside)


def _refuse_quantized(path: str, module: nn.Module) -> None:
    own = [parameter.dtype for parameter in module._parameters.values() if parameter is not None]
    quantized = [dtype for dtype in own if not (is_compute_dtype(dtype) or dtype.is_complex)]
    # A linear layer without any parameter keeps its weight packed in buffers.
    if quantized or (linear_sizes(module) is not None and not own):
        found = f"in {quantized[0]}" if quantized else "packed in buffers"
        raise StateError(
            f"train: {path or 'the backbone'} is a {type(module).__name__} with weights {found}, and full training needs "
            "floating-point parameters; leave it out of train= and attach a LoRA there"
        )


def _refuse_inference(name: str, tensor: Tensor) -> None:
    if tensor.is_inference():
        raise StateError(
            f"train: {name} was made under torch.inference_mode, and torch cannot train such tensors; build or load the "
            "backbone outside of that mode"
        )


def refuse_taken(attachment: Attachment, names: Sequence[str]) -> None:
    """Refuses full training of tensors whose own values another attached delta keeps.

    With two copies of one tensor, the order of detaching would decide which values come back.

    Raises:
        StateError: if another delta fully trains one of them under any name, or is merged into it.
    """
    if not names:
        return
    backbone, record = attachment.backbone, attachment.record
    # By identity, because tied weights have several names.
    wanted = {id(tensor) for tensor in tensors_at(backbone, record, names).values()}
    for other in records_of(backbone):
        if other is record:
            continue
        for found, advice in ((other.fully_trained, "detach()"), (other.weights_before_merge, "unmerge()")):
            held = tensors_at(backbone, other, found)
            both = sorted(name for name, tensor in held.items() if id(tensor) in wanted)
            if both:
                trains = isinstance(held[both[0]], nn.Parameter)
                so = "fully trains it already" if trains else "has running statistics of its own there already"
                so = so if advice == "detach()" else "is merged into it"
                raise StateError(f"{both[0]}: delta {other.name!r} {so}; {advice} that delta first")


def put_trained_values(attachment: Attachment) -> None:
    """Copies the trained values into the backbone, and keeps the backbone's own."""
    record = attachment.record
    if record.unsaved:
        others = [other for other in records_of(attachment.backbone) if other is not record]
        taken = {name for other in others for name in other.backbone_values}
        # Buffers that are not saved, such as caches, do not keep two deltas apart: the delta that was there first has them.
        for name in record.unsaved & taken & record.trained_values.keys():
            del record.trained_values[name]
    if record.trained_values:
        # Both sides are complete in the record before a tensor changes. After an interruption the backbone holds a mixture,
        # and either side can be put into it.
        record.backbone_values = record.backbone_values or _copies(
            tensors_at(attachment.backbone, record, record.trained_values)
        )
        _put(attachment, record.trained_values)
        record.trained_values = {}


def put_backbone_values(attachment: Attachment) -> None:
    """Copies the backbone's own values back into it, and keeps the trained ones, and the running statistics that moved."""
    record = attachment.record
    notice_moved_buffers(attachment.backbone, record)
    if record.backbone_values:
        record.trained_values = record.trained_values or _copies(
            tensors_at(attachment.backbone, record, record.backbone_values)
        )
        resized = [*_put(attachment, record.backbone_values), *_put_resized(attachment)]
        record.backbone_values = {}
        if resized:
            warn(
                f"{resized[0]}: delta {record.name!r} fully trains it, and it was resized while the delta was attached "
                f"({len(resized)} such tensors); only the rows that it had before have the backbone's own values again"
            )


@torch.no_grad()
def _put_resized(attachment: Attachment) -> list[str]:
    """Copies the backbone's own rows into heads that were resized into new modules, and returns the names of their tensors.

    `resize_token_embeddings` makes a new head that starts with the rows of the old one: those that the delta has trained.
    """
    record, found = attachment.record, []
    here, held = dict(tensors_of(attachment.backbone)), tensors_at(attachment.backbone, record, record.backbone_values)
    for name, own in record.backbone_values.items():
        new, trained = here.get(name), record.trained_values.get(name)
        if new is None or trained is None or new is held.get(name) or not new.ndim or new.shape == own.shape:
            continue
        rows = min(len(new), len(own))
        if new.shape[1:] == own.shape[1:] and torch.equal(new[:rows], trained[:rows].to(new.device, new.dtype)):
            new[:rows].copy_(own[:rows])
            found.append(name)
    return found


def fully_trained_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Returns the tensors of the backbone that a delta fully trains, and the running statistics that moved, by name."""
    return tensors_at(attachment.backbone, attachment.record, attachment.record.fully_trained)


def tensors_at(backbone: nn.Module, record: Record, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns tensors of the backbone by the names that an attached delta has for them, as far as they are there.

    If the user replaced, wrapped or removed their module since the delta was attached, they are those of the old module: the
    new one's values are the user's.
    """
    wanted = list(names)
    own = dict(tensors_of(backbone, unsaved=True)) if wanted else {}
    held = modules_of(backbone, record) if wanted else {}
    found = {}
    for name in wanted:
        module = held.get(parent_of(name))
        tensor = own.get(name) if module is None else dict(tensors_in("", module, unsaved=True)).get(name_of(name))
        if tensor is not None:
            found[name] = tensor
    return found


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of tensors by name. A tied tensor, which has several names, is copied once."""
    with normal_tensors():
        copies = {key: tensor.detach().clone() for key, tensor in {id(t): t for t in tensors.values()}.items()}
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


@torch.no_grad()
def _put(attachment: Attachment, values: Mapping[str, Tensor]) -> list[str]:
    """Copies values into a backbone's tensors, and returns the names of those that have another shape."""
    # Copied in place: optimisers, compiled code and tied modules keep their references to the parameters.
    resized = []
    for name, tensor in tensors_at(attachment.backbone, attachment.record, values).items():
        value = values[name]
        if tensor.shape == value.shape and not tensor.is_inference():
            tensor.copy_(value)
        elif not isinstance(tensor, nn.Parameter):
            # A forward has replaced the buffer by one of another shape, or by one that cannot be changed in place.
            holder = holder_of(attachment.backbone, attachment.record, name)
            holder._buffers[name_of(name)] = value.to(tensor.device, tensor.dtype, copy=True)
        else:
            resized.append(name)
            # `resize_token_embeddings` keeps the first rows of embeddings and heads.
            if tensor.ndim and tensor.shape[1:] == value.shape[1:]:
                rows = min(len(tensor), len(value))
                tensor[:rows].copy_(value[:rows])
    return resized


def refresh_gradients(backbone: nn.Module, grad_ledger: GradLedger) -> None:
    """Sets `requires_grad` of the backbone's parameters for all attached deltas together."""
    # `hold`: a delta that is not trainable must keep the values of its modules, even if no delta freezes the backbone.
    attached = [record for record in records_of(backbone) if not record.leaving]
    own = dict(own_parameters(backbone))
    there = set(map(id, own.values()))
    held = {
        record: {
            # What the user put in the place of a removed module, such as a resized head, is trained in its stead.
            id(tensor if id(tensor) in there else own.get(name, tensor))
            for name, tensor in tensors_at(backbone, record, record.fully_trained).items()
        }
        for record in attached
        if record.backbone_values or record.trained_values
    }
    # While a delta is not active, the tensors have the backbone's own values, which nobody trains.
    train = {key for record, keys in held.items() if record.trainable and record.active for key in keys}
    hold = {key for keys in held.values() for key in keys} - train
    grad_ledger.apply(own, train=train, hold=hold, freeze=any(record.freeze for record in attached))


def current_values(backbone: nn.Module, names: Sequence[str], record: Record) -> dict[str, Tensor]:
    """Returns copies of these backbone tensors, except for those that the delta fully trains already."""
    own = dict(tensors_of(backbone)) if names else {}
    with normal_tensors():
        return {name: own[name].detach().clone() for name in names if name not in record.fully_trained}


def _refuse_offloaded(name: str, tensor: Tensor, module: nn.Module) -> None:
    if tensor.is_meta and hasattr(module, "_hf_hook"):
        raise StateError(
            f"train: {name} is offloaded by accelerate, and full training needs its values in memory; give it a device in the "
            "device_map, or leave it out of train="
        )
