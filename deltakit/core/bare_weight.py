"""Reads the backbone's own weights as matrices [out, in], however their modules store them.

Modules store their weights in different orientations: `nn.Linear` [out, in], transformers' `Conv1D` and embeddings [in, out],
convolutions [out, in, *kernel], mixtures of experts as stacks of either. Methods only see [*stack, out, in].
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from deltakit.core.copied_modules import at_rest
from deltakit.core.feature_slice import FeatureSlice
from deltakit.core.linear import is_compute_dtype, is_conv1d, linear_sizes, wide
from deltakit.core.sharding import gathered, is_sharded
from deltakit.core.target import Target
from deltakit.errors import StateError, TargetError


@dataclass(frozen=True)
class WeightView:
    """How a parameter is read as matrices [*stack, out, in].

    `flipped`: it is stored as [in, out]. `kernel`: the dimensions after [out] in a convolution. `feature_slice`: the part of
    the output features that is read; None for all.
    """

    name: str = "weight"
    flipped: bool = False
    kernel: tuple[int, ...] = ()
    feature_slice: FeatureSlice | None = None

    def matrix(self, stored: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the stored parameter as [*stack, out, in], or a vector as [out]; only the feature slice, if there is one."""
        return self.part(stored.flatten(1) if self.kernel else stored.mT if self.flipped else stored)

    def part(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the feature slice of a matrix [*stack, out, in] or a vector [out]; all of it if there is none."""
        if self.feature_slice is None:
            return weight
        return self.feature_slice.take(weight) if weight.ndim == 1 else self.feature_slice.take(weight.mT).mT

    def stored(self, matrix: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns a matrix [*stack, out, in] in the parameter's stored shape, with zeros outside the feature slice."""
        if self.feature_slice is not None:
            spread = self.feature_slice.spread
            matrix = spread(matrix) if matrix.ndim == 1 else spread(matrix.mT).mT
        if self.kernel:
            return matrix.view(-1, *self.kernel)
        return matrix.mT if self.flipped else matrix


_PLAIN = WeightView()
# Where a model is exported without `strict`, fake tensors stand for its parameters.
_PLAIN_CLASSES = (Tensor, nn.Parameter, FakeTensor)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_view(target: Target) -> WeightView:
    """Returns how the weight of a target is read: the parameter that it names, or its module's `weight`."""
    module = target.module
    if target.parameter:
        parameter = module._parameters[target.parameter]
        # transformers' expert modules say whether their stacks are [in, out].
        matrices = parameter is not None and parameter.ndim > 1
        flipped = matrices and bool(getattr(module, "is_transposed", False))
        return WeightView(target.parameter, flipped, feature_slice=target.feature_slice)
    if isinstance(module, _CONVOLUTIONS):
        return WeightView(kernel=(module.in_channels // module.groups, *module.kernel_size))
    flipped = is_conv1d(module) or isinstance(module, nn.Embedding)
    if not flipped and target.feature_slice is None:
        # Nearly always, and building takes as long as all else here.
        return _PLAIN
    return WeightView(flipped=flipped, feature_slice=target.feature_slice)


def bare_weight(module: nn.Module, view: WeightView) -> Float[Tensor, "..."]:
    """Returns the backbone's own weight [*stack, out, in] without gradients, dequantized and gathered over processes.

    Weight patches of other deltas are not in it: they put their sums into the module's `__dict__`, and the registered
    parameter stays unchanged.

    Raises:
        StateError: if the weight has no values in memory (meta device, offload).
        TargetError: if there is no such parameter, or the weight is quantized and its module is not a linear layer.
    """
    held: Tensor | None = module._parameters.get(view.name)
    module = module if held is not None else at_rest(module)
    if held is None:
        # Parametrized weights (weight norm) are attributes that torch computes. Packed weights of quantized linear layers
        # may be in any format, so `dequantized` computes them below from the layer's output.
        held = getattr(module, view.name, None) if linear_sizes(module) is None else None
        if held is None and linear_sizes(module) is None:
            raise TargetError(
                f"a {type(module).__name__} has no parameter {view.name!r}; leave this target out with exclude="
            )
    packed = [*module.parameters(recurse=False), *module.buffers(recurse=False)] if held is None else [held]
    if any(tensor.is_meta for tensor in packed):
        raise StateError(
            f"{view.name} of a {type(module).__name__} has no values here (meta device or offload); load it into memory, "
            "or leave this target out with exclude="
        )
    if held is None or (is_quantized(held) and not hasattr(held, "full_tensor")):
        # This is [out, in] already, whatever the module stores.
        return view.part(dequantized(module, compute_dtype(module)))
    return view.matrix(gathered(held).detach())


def is_quantized(weight: Tensor) -> bool:
    """Returns whether a weight is stored as anything but plain floating-point numbers of at least 16 bits."""
    return type(weight) not in _PLAIN_CLASSES or not is_compute_dtype(weight.dtype)


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """Returns the dtype a quantized layer computes in: its `compute_dtype`, or its bias's or scales', or float32."""
    own = [getattr(layer, "compute_dtype", None), *(t.dtype for t in (*layer.parameters(), *layer.buffers()))]
    found = [dtype for dtype in own if isinstance(dtype, torch.dtype) and is_compute_dtype(dtype)]
    return found[0] if found else torch.float32


@torch.no_grad()
def dequantized(layer: nn.Module, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """Returns the weight that a linear layer computes with, in float32 or wider.

    It runs the layer's forward on the identity matrix, without hooks. This works for every quantizer: they store weights
    in different formats, but each forward computes a linear map.

    Raises:
        TargetError: if the module is not a linear layer.
    """
    sizes = linear_sizes(layer)
    if sizes is None:
        raise TargetError(
            f"a {type(layer).__name__} has quantized weights, and deltakit can dequantize linear layers only; leave this "
            "target out with exclude="
        )
    device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), None)
    output, bias = layer.forward(torch.eye(sizes[0], dtype=dtype, device=device)), getattr(layer, "bias", None)
    return wide(output if bias is None else output - bias).mT


@torch.no_grad()
def embedding_rows(layer: nn.Embedding, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d"]:
    """Returns the vectors of these ids in an embedding's own weight: dequantized, and before the embedding scales them."""
    ids = ids.to(layer.weight.device)
    if not is_quantized(layer.weight):
        return layer.weight.detach()[ids]
    # As in `dequantized`: formats differ, but each forward looks vectors up. The forward without hooks.
    rows: Tensor = layer.forward(ids)
    return rows / getattr(layer, "embed_scale", 1.0)


@torch.no_grad()
def weight_entries(layer: nn.Module, places: Sequence[tuple[int, int]]) -> list[float] | None:
    """Returns single entries (row, column) of the weight that a quantized linear layer computes with.

    It runs the layer's forward on one unit vector for each entry, without hooks. None if that is impossible here: without
    values in memory, or with a kernel for another device.
    """
    sizes, tensors = linear_sizes(layer), [*layer.parameters(), *layer.buffers()]
    if sizes is None or any(tensor.is_meta or is_sharded(tensor) for tensor in tensors):
        return None
    columns = torch.tensor([column for _, column in places])
    try:
        # A copy, because some layers change in their first call (bitsandbytes in 8 bits).
        twin = copy.deepcopy(layer)
        x = nn.functional.one_hot(columns, sizes[0]).to(tensors[0].device, compute_dtype(layer))
        output, bias = twin.forward(x), getattr(twin, "bias", None)
    except Exception:
        # Quantizers' kernels raise errors of any class.
        return None
    rows = (output if bias is None else output - bias).float().tolist()
    return [rows[number][row] for number, (row, _) in enumerate(places)]


def bias_of(module: nn.Module) -> Tensor | None:
    """Returns the tensor that holds a module's bias; None if it has none."""
    # Layers with packed weights keep their bias as a buffer.
    return module._parameters.get("bias", module._buffers.get("bias"))


@dataclass(frozen=True)
class BareLayer:
    """The bare weight and bias of a target's module, computed on access; only the feature slice, if there is one."""

    module: nn.Module
    view: WeightView

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The bare weight in float32 or wider.

        Raises:
            StateError: if the weight has no values in memory (meta device, offload).
            TargetError: if there is no weight, it is no matrix (norms have a vector, and some use 1 + weight), or it is
                quantized and its module is not a linear layer.
        """
        weight = bare_weight(self.module, self.view)
        if weight.ndim != 2:
            raise TargetError(
                f"the weight of a {type(self.module).__name__} is no matrix [d_out, d_in], so nothing can be merged into it; "
                "leave the delta attached"
            )
        return wide(weight)

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """The bare bias in float32 or wider; None if there is none."""
        bias = bias_of(self.module)
        if bias is None:
            return None
        held = gathered(bias).detach()
        return wide(held if self.view.feature_slice is None else self.view.feature_slice.take(held))
