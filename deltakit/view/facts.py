"""What a tree says about a tensor or a module beside its shape: its dtype, and the kernel of a convolution."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


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
