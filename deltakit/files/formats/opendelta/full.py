"""Reads what a delta of OpenDelta has of the backbone's own tensors: biases of BitFit, and modules that were not frozen."""

from torch import Tensor

from deltakit.core import names_by_id
from deltakit.errors import CheckpointError
from deltakit.files.formats.opendelta.found import Found
from deltakit.files.formats.same_values import is_own
from deltakit.files.formats.shapes import refuse_integers


def read_bitfit(found: Found) -> None:
    """Adds BitFit. OpenDelta saves the biases themselves; deltakit's are added to those of the backbone.

    A module without a bias (T5's) has a new one in OpenDelta, whose value is the difference.
    """
    # Where `freeze_module` was never called, the file has all weights, too, and only the backbone shows which biases changed.
    whole = found.backbone is None and all(
        _weight_beside(name) in found.tensors for name in found.tensors if _is_bias(name)
    )
    for name, value in found.tensors.items():
        path = name.removesuffix(".bias")
        if path != name:
            refuse_integers({name: value}, found.folder)
        if path.endswith(".bitfit"):
            found.parts.add("bitfit", {}, path.removesuffix(".bitfit"), {"bias": value})
            found.read.add(name)
        elif path != name and (whole or _is_bitfit(found, name)):
            own = found.own.get(name)
            if own is not None and own.is_meta and not value.is_meta:
                raise _needs_weights(found, name)
            is_absolute = own is not None and own.shape == value.shape and not value.is_meta
            difference = value - own.detach().to(value) if own is not None and is_absolute else value
            found.parts.add("bitfit", {}, path, {"bias": difference})
            found.read.add(name)


def fully_trained(found: Found) -> dict[str, Tensor]:
    """Returns the tensors that replace the backbone's, by the backbone's names.

    Where `freeze_module` was never called the file has the whole backbone: what is as the backbone's own is left out.

    Raises:
        CheckpointError: if the backbone has no such tensor.
    """
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in found.read}
    if found.backbone is None:
        return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    names = names_by_id(found.own.items())
    if found.own.keys() <= tensors.keys() and any(tensor.is_meta for tensor in found.own.values()):
        raise _needs_weights(found, next(iter(found.own)))
    full: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = found.own.get(name)
        if own is None and tensor.is_floating_point():
            raise CheckpointError(
                f"{found.folder}: {name} is in no module of this backbone, and no part of the {found.config['delta_type']} "
                "delta that its config describes; load the backbone that it was trained on, and save several deltas one by one"
            )
        if own is not None and own.is_floating_point():
            refuse_integers({name: tensor}, found.folder)
        # Buffers of ids and positions are never trained, and other versions of transformers have others.
        if own is not None and tensor.is_floating_point() and not is_own(tensor, own):
            full |= dict.fromkeys(names[id(own)], tensor)
    return full


def _is_bitfit(found: Found, name: str) -> bool:
    """Returns whether a bias belongs to BitFit, and not to a module that was not frozen, whose weight is there, too."""
    own = found.own.get(name)
    value, weight = found.tensors[name], _weight_beside(name)
    if own is not None and is_own(value, own) and weight in found.tensors:
        return False
    beside = found.tensors.get(weight)
    return beside is None or (weight in found.own and is_own(beside, found.own[weight]))


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _weight_beside(name: str) -> str:
    return f"{name.removesuffix('bias')}weight"


def _needs_weights(found: Found, name: str) -> CheckpointError:
    return CheckpointError(
        f"{found.folder}: its values must be compared with the backbone's, such as {name}, and these are not in memory here; "
        "load the delta onto the model with its weights, and save it from there"
    )
