"""On which dimension of its output a module has its features."""

import torch
from torch import Tensor, nn

from deltakit.core import linear_sizes
from deltakit.errors import TargetError
from deltakit.selection.dry_run import dry_run

_CHANNELS_FIRST = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def feature_axis(module: nn.Module) -> int:
    """The dimension of the features in what a module gives: 1 where channels stand first, else -1.

    >>> feature_axis(nn.Linear(2, 3)), feature_axis(nn.BatchNorm2d(3)), feature_axis(nn.Conv2d(3, 5, 2))
    (-1, 1, -3)
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        # From the end, for a convolution takes single examples without a batch too, as an instance norm does.
        return -1 - len(module.kernel_size)
    if isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        return -2 if isinstance(module, nn.InstanceNorm1d) else -3 if isinstance(module, nn.InstanceNorm2d) else -4
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or type(module) in (nn.LayerNorm, nn.RMSNorm) or linear_sizes(module):
        return -1
    return _tried(module, weight.numel())


def _tried(module: nn.Module, size: int) -> int:
    """Which shape a norm takes: some permute to torch's layer norm and back themselves (SqueezeBERT, ConvNeXt)."""
    a, b = (other for other in (2, 3, 5) if other != size) if size in (2, 3, 5) else (3, 5)
    for axis, shape in ((-1, (2, a, size)), (-1, (2, a, b, size)), (1, (2, size, a)), (1, (2, size, a, b))):
        try:
            given = dry_run(module)(torch.ones(shape, dtype=torch.float64))
        except Exception:
            # Whatever a forward that we know nothing of raises: it does not take this shape.
            continue
        if isinstance(given, Tensor) and given.shape == shape:
            return axis
    return -1


def features_last(x: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with its features, `size` at `axis`, as the last dimension; the same call undoes it.

    Raises:
        TargetError: if there are not that many.
    """
    if x.shape[axis] != size:
        raise TargetError(
            f"expected {size} features at dimension {axis} of what this target gives, found shape {tuple(x.shape)}; "
            "leave it out with exclude=, or name a module inside it"
        )
    return x if axis == -1 else x.transpose(axis, -1)


def along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """Values [d] in a shape that goes along one dimension of a tensor of `ndim` dimensions."""
    behind = -1 - axis if axis < 0 else ndim - 1 - axis
    return values.view(-1, *[1] * behind) if behind else values
