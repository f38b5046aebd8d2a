"""Which modules PEFT adapts, where it computes something else than deltakit, and the error for that."""

from typing import Any

from torch import nn

from deltakit.core import Attachment, is_conv1d, is_quantized, linear_sizes
from deltakit.errors import CheckpointError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_linear(module: nn.Module) -> bool:
    """Returns whether PEFT takes a module for a linear layer."""
    weight = module._parameters.get("weight")
    quantized = linear_sizes(module) is not None and weight is not None and is_quantized(weight)
    return isinstance(module, nn.Linear) or is_conv1d(module) or quantized


def adapts(module: nn.Module, kind: str) -> bool:
    """Returns whether PEFT has a LoRA or an IA3 for this type of module."""
    others: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Conv3d) if kind == "ia3" else (*_CONVOLUTIONS, nn.Embedding)
    return is_linear(module) or isinstance(module, others)


def differs(module: nn.Module | None) -> str:
    """Returns why PEFT's LoRA computes something else at a module; "" if it does not.

    PEFT adds a convolution of its own with zeros as padding and without dilation, and looks up an embedding itself.
    """
    if isinstance(module, _CONVOLUTIONS):
        if module.groups != 1:
            return "is a grouped convolution"
        if module.padding_mode != "zeros" or any(step != 1 for step in module.dilation):
            return "is a convolution with dilation, or padded by other than zeros"
    base: Any = next((kind for kind in (*_CONVOLUTIONS, nn.Embedding) if isinstance(module, kind)), None)
    # PEFT follows the scale of Gemma's embeddings, and nothing else that a forward does.
    if (
        base is not None
        and getattr(type(module), "forward", None) is not base.forward
        and not hasattr(module, "embed_scale")
    ):
        return f"is a {type(module).__name__} with a forward of its own"
    return ""


def impossible(attachment: Attachment, why: str) -> CheckpointError:
    """Returns the error for a delta that PEFT has no adapter for."""
    name = attachment.record.name
    return CheckpointError(f"delta {name!r} cannot be saved as an adapter of PEFT: {why}; save it without format=")
