"""What a tree says about a tensor or a module beside its shape: its dtype, its memory, and the kernel of a convolution."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def stored_bytes(tensor: Tensor) -> int:
    """Returns the memory of a tensor's values, with what a quantizer stores beside them; 0 for a lazy parameter."""
    if torch.nn.parameter.is_lazy(tensor):
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        # torchao's tensors have the dtype and the shape of the weight that they stand for.
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    # bitsandbytes' scales, which for 4 bits may be quantized again.
    state = getattr(tensor, "quant_state", None)
    beside = []
    while state is not None:
        beside += [value for value in vars(state).values() if isinstance(value, Tensor)]
        state = getattr(state, "state2", None)
    return tensor.nbytes + sum(value.nbytes for value in beside)


def dtype_of(tensor: Tensor) -> str:
    """Returns the stored dtype, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def kernel_of(module: nn.Module) -> str:
    """Returns the kernel of a convolution, and its stride, dilation and groups where they are not 1; "" for others."""
    if not isinstance(module, _ConvNd):
        return ""
    words = [f"kernel {'×'.join(map(str, module.kernel_size))}"]
    for name, sizes in (("stride", module.stride), ("dilation", module.dilation)):
        if set(sizes) != {1}:
            words.append(f"{name} {'×'.join(map(str, sizes)) if len(set(sizes)) > 1 else sizes[0]}")
    return " ".join(words + ([f"groups {module.groups}"] if module.groups != 1 else []))
