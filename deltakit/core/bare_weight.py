"""A weight as the backbone holds it, as matrices [out, in] whatever module it belongs to.

Modules store their weights in different orientations: `nn.Linear` [out, in], transformers' `Conv1D` and embeddings [in, out],
convolutions [out, in, *kernel], mixtures of experts as stacks of either. Methods work on [*stack, out, in] alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core.feature_slice import FeatureSlice
from deltakit.core.linear import is_compute_dtype, is_conv1d, linear_sizes, wide
from deltakit.core.sharding import gathered
from deltakit.core.target import Target
from deltakit.errors import StateError, TargetError


@dataclass(frozen=True)
class WeightView:
    """How a parameter is read as matrices [*stack, out, in].

    `flipped`: it is stored as [in, out]. `kernel`: the dimensions behind [out] in a convolution. `feature_slice`: the part of
    the output features that is meant.
    """

    name: str = "weight"
    flipped: bool = False
    kernel: tuple[int, ...] = ()
    feature_slice: FeatureSlice | None = None

    def matrix(self, stored: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The stored parameter as [*stack, out, in], or a vector as [out]; only the slice, if there is one."""
        weight = stored.flatten(1) if self.kernel else stored.mT if self.flipped else stored
        if self.feature_slice is None:
            return weight
        return self.feature_slice.take(weight) if weight.ndim == 1 else self.feature_slice.take(weight.mT).mT

    def stored(self, matrix: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A matrix [*stack, out, in] in the parameter's own shape, with zeros outside the slice."""
        if self.feature_slice is not None:
            spread = self.feature_slice.spread
            matrix = spread(matrix) if matrix.ndim == 1 else spread(matrix.mT).mT
        if self.kernel:
            return matrix.view(-1, *self.kernel)
        return matrix.mT if self.flipped else matrix


def weight_view(target: Target) -> WeightView:
    """How the weight of a target is read: the parameter that it names, or its module's `weight`."""
    module = target.module
    if target.parameter:
        parameter = module._parameters[target.parameter]
        # transformers' expert modules say whether their stacks are [in, out].
        matrices = parameter is not None and parameter.ndim > 1
        flipped = matrices and bool(getattr(module, "is_transposed", False))
        return WeightView(target.parameter, flipped, feature_slice=target.feature_slice)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return WeightView(kernel=(module.in_channels // module.groups, *module.kernel_size))
    flipped = is_conv1d(module) or isinstance(module, nn.Embedding)
    return WeightView(flipped=flipped, feature_slice=target.feature_slice)


def bare_weight(module: nn.Module, view: WeightView) -> Float[Tensor, "..."]:
    """The weight [*stack, out, in] that the backbone itself has, without gradients: dequantized, gathered over processes.

    Never a sum that a weight patch of another delta shows in its place: that one stands in the module's `__dict__`, and the
    parameter stays registered.

    Raises:
        StateError: if it has no values in memory (meta device, offload).
        TargetError: if there is no such parameter, or a quantized layer that is no linear layer.
    """
    held: Tensor | None = module._parameters.get(view.name)
    if held is None:
        # Parametrized weights (weight norm) are computed; packed ones are known by what the layer computes.
        held = getattr(module, view.name, None) if linear_sizes(module) is None else None
        if held is None and linear_sizes(module) is None:
            raise TargetError(f"a {type(module).__name__} has no parameter {view.name!r}; name another target")
    packed = [*module.parameters(recurse=False), *module.buffers(recurse=False)] if held is None else [held]
    if any(tensor.is_meta for tensor in packed):
        raise StateError(
            f"{view.name} of a {type(module).__name__} has no values here (meta device or offload); load it into memory, "
            "or leave this target out with exclude="
        )
    if held is None or (is_quantized(held) and not hasattr(held, "full_tensor")):
        return view.matrix(dequantized(module, compute_dtype(module)))
    return view.matrix(gathered(held).detach())


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held as something else than plain numbers that one computes with."""
    return type(weight) not in (Tensor, nn.Parameter) or not is_compute_dtype(weight.dtype)


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a quantized layer computes in: its `compute_dtype`, or that of its bias or scales, or float32."""
    own = [getattr(layer, "compute_dtype", None), *(t.dtype for t in (*layer.parameters(), *layer.buffers()))]
    found = [dtype for dtype in own if isinstance(dtype, torch.dtype) and is_compute_dtype(dtype)]
    return found[0] if found else torch.float32


@torch.no_grad()
def dequantized(layer: nn.Module, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """The weight that a linear layer computes with, in float32 or wider: what its forward makes of each unit vector.

    It works for every quantizer, as their storage differs and their forward does not. Hooks are not called.

    Raises:
        TargetError: if the module is no linear layer.
    """
    sizes = linear_sizes(layer)
    if sizes is None:
        raise TargetError(
            f"a {type(layer).__name__} with quantized weights: only of linear layers can the values be computed"
        )
    device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), None)
    made, bias = layer.forward(torch.eye(sizes[0], dtype=dtype, device=device)), getattr(layer, "bias", None)
    return wide(made if bias is None else made - bias).mT


@dataclass(frozen=True)
class BareLayer:
    """The bare weight and bias of a target's module, each computed when it is asked for; only the slice, if there is one."""

    module: nn.Module
    view: WeightView

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The bare weight [d_out, d_in] in float32 or wider.

        Raises:
            StateError: as `bare_weight` does.
            TargetError: if it is no such matrix: norms have a vector, of which some use 1 + weight.
        """
        weight = bare_weight(self.module, self.view)
        if weight.ndim != 2:
            raise TargetError(
                f"the weight of a {type(self.module).__name__} is no matrix [d_out, d_in], so nothing can be merged into it; "
                "leave it attached"
            )
        return wide(weight)

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """The bare bias [d_out] in float32 or wider; None if there is none."""
        # Packed layers keep it as a buffer.
        bias = self.module._parameters.get("bias", self.module._buffers.get("bias"))
        if bias is None:
            return None
        held = gathered(bias).detach()
        return wide(held if self.view.feature_slice is None else self.view.feature_slice.take(held))
