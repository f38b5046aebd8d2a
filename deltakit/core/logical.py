"""The parameters of a model as its architecture defines them, however a quantizer stores them.

Quantizers pack weights: bitsandbytes' 4-bit weights are [d_out * d_in / 2, 1] bytes, GPTQ and AWQ keep `qweight`, `qzeros` and
`scales` instead of a weight. Counts and shapes that a user reads, and the comparison of two backbones, are those of the model.
Nothing is dequantized for them: a linear layer has its sizes as attributes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltakit.core.linear import is_compute_dtype, is_conv1d, linear_sizes
from deltakit.core.paths import join, own_modules


class LogicalParameter(NamedTuple):
    """One parameter: its name in its module, its logical shape (None while it is lazy), and the tensor that stores it."""

    name: str
    shape: torch.Size | None
    stored: Tensor

    @property
    def numel(self) -> int:
        return self.shape.numel() if self.shape is not None else 0


def logical_parameters(module: nn.Module) -> list[LogicalParameter]:
    """Returns the parameters of a module itself, without those of the modules in it."""
    if not module._parameters and not module._buffers:
        return []
    packed = _packed_weight(module)
    if packed is not None:
        # What else the layer has are scales, zero points and other parts of the packed weight.
        bias = module._parameters.get("bias", module._buffers.get("bias"))
        found = [packed]
        return found if bias is None else [*found, LogicalParameter("bias", bias.shape, bias)]
    held = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
    # Scales of quantized parameters that are not a linear layer's, such as `down_proj_scale_inv` of FP8 experts.
    scaled = tuple(f"{name}_" for name, parameter in held if not is_compute_dtype(parameter.dtype))
    return [
        LogicalParameter(name, _shape(parameter), parameter)
        for name, parameter in held
        if not (scaled and name.startswith(scaled) and "scale" in name)
    ]


def named_logical_parameters(backbone: nn.Module) -> Iterator[tuple[str, LogicalParameter]]:
    """Yields the parameters of a backbone without those of deltas, each once, under its first name."""
    seen: set[int] = set()
    for path, module in own_modules(backbone):
        for parameter in logical_parameters(module):
            if id(parameter.stored) not in seen:
                seen.add(id(parameter.stored))
                yield join(path, parameter.name), parameter


def num_parameters(backbone: nn.Module) -> int:
    """Returns the number of a backbone's own parameters, each counted once."""
    return sum(parameter.numel for _, parameter in named_logical_parameters(backbone))


def _packed_weight(module: nn.Module) -> LogicalParameter | None:
    """The weight of a linear layer that is quantized; None for every other module."""
    weight = module._parameters.get("weight")
    # Tensor subclasses, such as torchao's, have the dtype and the shape of the weight that they stand for.
    if weight is not None and is_compute_dtype(weight.dtype):
        return None
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    sizes = linear_sizes(module) if own and not is_conv1d(module) else None
    if sizes is None:
        return None
    shape = torch.Size(sizes[::-1])
    if weight is not None:
        return LogicalParameter("weight", shape, weight)
    codes = [tensor for tensor in own if tensor.ndim and not is_compute_dtype(tensor.dtype)]
    stored = max(codes, key=lambda tensor: tensor.nbytes, default=None)
    # A module with sizes and counters is no packed layer: no format has less than a bit for each weight.
    if stored is None or 8 * stored.nbytes < math.prod(sizes):
        return None
    return LogicalParameter("weight", shape, stored)


def _shape(parameter: Tensor) -> torch.Size | None:
    if type(parameter) is nn.Parameter and "quant_state" not in (own := parameter.__dict__) and "ds_shape" not in own:
        # Nearly always, and a Tensor that lacks an attribute takes long to say so.
        return parameter.shape
    if torch.nn.parameter.is_lazy(parameter):
        return None
    # bitsandbytes keeps the shape of a packed weight in `quant_state`, DeepSpeed ZeRO-3 that of a sharded one in `ds_shape`.
    known = getattr(getattr(parameter, "quant_state", None), "shape", getattr(parameter, "ds_shape", None))
    return parameter.shape if known is None else torch.Size(known)
