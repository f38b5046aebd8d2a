"""Finds the dimension of a module's output that holds its features."""

from collections.abc import Iterator

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from deltakit.core import hidden_output, linear_sizes, own_modules
from deltakit.errors import TargetError
from deltakit.selection.dry_run import dry_run

_CHANNELS_FIRST = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def feature_axis(module: nn.Module) -> int:
    """Returns the dimension of the features in a module's output: -1 if they are last, else that of the channels.

    >>> feature_axis(nn.Linear(2, 3)), feature_axis(nn.BatchNorm2d(3)), feature_axis(nn.Conv2d(3, 5, 2))
    (-1, 1, -3)
    """
    # Convolutions and instance norms also accept one example without a batch dimension, so we count from the end.
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    if isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        return -2 if isinstance(module, nn.InstanceNorm1d) else -3 if isinstance(module, nn.InstanceNorm2d) else -4
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    weight = module._parameters.get("weight")
    if weight is None and any(isinstance(inside, nn.modules.conv._ConvNd) for _, inside in own_modules(module)):
        measured = output_features(module)
        return measured[0] if measured is not None else -1
    if weight is None or weight.ndim != 1 or type(module) in (nn.LayerNorm, nn.RMSNorm) or linear_sizes(module):
        return -1
    return _axis_by_trial(module, weight.numel())


def output_features(module: nn.Module) -> tuple[int, int] | None:
    """Returns the dimension and the number of the features in a block's output; None if its forward does not show them.

    A dry-run copy is called on the meta device with two sizes of everything but the features, which stay as they are.

    >>> output_features(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()))
    (-3, 5)
    """
    copy = dry_run(module, "meta")
    for features, order in _inputs(module):
        shapes = []
        for sizes in ((2, 67, 71, 73), (3, 79, 83, 89)):
            shape = [features if place == "C" else sizes[int(place)] for place in order]
            try:
                with torch.no_grad():
                    shapes.append(hidden_output(copy(torch.ones(shape, dtype=torch.float64, device="meta"))).shape)
            except Exception:
                # An unknown forward may raise anything. Any error means that it does not accept this shape.
                break
        if len(shapes) == 2 and len(shapes[0]) == len(shapes[1]):
            kept = [axis for axis, (a, b) in enumerate(zip(*shapes, strict=True)) if a == b]
            if len(kept) == 1:
                return kept[0] - len(shapes[0]), shapes[0][kept[0]]
    return None


def _inputs(module: nn.Module) -> Iterator[tuple[int, str]]:
    """Inputs that a block may take: numbers of features, with the order of the dimensions (0 is the batch)."""
    layers = [inside for _, inside in own_modules(module)]
    convolved = any(isinstance(layer, nn.Conv2d) for layer in layers)
    orders = ("0C12", "012C", "01C", "0C1") if convolved else ("01C", "0C1", "0C", "0C12", "012C", "0C123")
    widths: dict[int, None] = {}
    for layer in layers:
        linear, weight = linear_sizes(layer), layer._parameters.get("weight")
        if isinstance(layer, nn.modules.conv._ConvNd):
            widths[layer.in_channels] = None
        elif linear is not None or (weight is not None and weight.ndim == 1):
            widths[linear[0] if linear is not None else len(weight)] = None  # type: ignore[arg-type]
    for features in list(widths)[:4]:
        yield from ((features, order) for order in orders)


def _axis_by_trial(module: nn.Module, size: int) -> int:
    """The axis found by calling a dry-run copy of a norm with several input shapes.

    Some norms permute their input to torch's layer norm and back (SqueezeBERT, ConvNeXt), so the class does not tell.
    """
    a, b = (other for other in (2, 3, 5) if other != size) if size in (2, 3, 5) else (3, 5)
    for axis, shape in ((-1, (2, a, size)), (-1, (2, a, b, size)), (1, (2, size, a)), (1, (2, size, a, b))):
        try:
            output = dry_run(module)(torch.ones(shape, dtype=torch.float64))
        except Exception:
            # An unknown forward may raise anything. Any error means that it does not accept this shape.
            continue
        if isinstance(output, Tensor) and output.shape == shape:
            return axis
    return -1


def features_last(x: Shaped[Tensor, "*shape"], axis: int, size: int) -> Shaped[Tensor, "*moved"]:
    """Returns the tensor with its feature dimension swapped to the end. The same call on the result undoes it.

    Args:
        axis: the dimension of the features, as `feature_axis` returns it.
        size: the expected number of features.

    Raises:
        TargetError: if the dimension has another size.
    """
    if x.shape[axis] != size:
        raise TargetError(
            f"the output of this target has shape {tuple(x.shape)}: expected {size} features at dimension {axis}, found "
            f"{x.shape[axis]}; omit this target with exclude=, or select a module inside it"
        )
    return x if axis == -1 else x.transpose(axis, -1)


def along(values: Shaped[Tensor, "d"], axis: int, ndim: int) -> Shaped[Tensor, "*shape"]:
    """Returns the values in a shape that broadcasts along dimension `axis` of a tensor with `ndim` dimensions."""
    behind = -1 - axis if axis < 0 else ndim - 1 - axis
    return values.view(-1, *[1] * behind) if behind else values
