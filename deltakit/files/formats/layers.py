"""Which modules PEFT and diffusers adapt, how configs name them, and where they compute something else than deltakit."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltakit.core import Site, is_conv1d, is_quantized, linear_sizes, own_modules
from deltakit.files.formats.writing import Writing

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_linear(module: nn.Module) -> bool:
    """Returns whether PEFT takes a module for a linear layer."""
    weight = module._parameters.get("weight")
    quantized = linear_sizes(module) is not None and weight is not None and is_quantized(weight)
    return isinstance(module, nn.Linear) or is_conv1d(module) or quantized


class Layers(NamedTuple):
    """The types of modules that PEFT has a method for, besides linear layers."""

    others: tuple[type[nn.Module], ...] = ()
    conv1d: bool = True
    """Whether transformers' Conv1D, a linear layer, is one of them."""

    def include(self, module: nn.Module) -> bool:
        """Returns whether PEFT adapts this type of module."""
        return (is_linear(module) and (self.conv1d or not is_conv1d(module))) or isinstance(module, self.others)


LAYERS_OF_LORA = Layers((*_CONVOLUTIONS, nn.Embedding))


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


def differs_with_new_weight(module: nn.Module | None) -> str:
    """Returns why a library that calls torch's function with an update computes something else at a module; "" if it does not.

    PEFT and LyCORIS do so with all updates but LoRA's.
    """
    base: Any = next((kind for kind in (*_CONVOLUTIONS, nn.Embedding) if isinstance(module, kind)), None)
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return "is a convolution that is padded by other than zeros"
    if base is not None and getattr(type(module), "forward", None) is not base.forward:
        return f"is a {type(module).__name__} with a forward of its own"
    return ""


def in_kernel(factor: Tensor, module: nn.Module) -> Tensor:
    """Returns a matrix [rows, channels * positions] as the kernel [rows, channels, *positions] of a convolution.

    For another module it is returned as it is.
    """
    return factor.unflatten(1, (-1, *module.kernel_size)) if isinstance(module, _CONVOLUTIONS) else factor


def pointwise(factor: Tensor, module: nn.Module) -> Tensor:
    """Returns a matrix as the kernel of a convolution over one position; for another module, as it is."""
    return factor[(..., *[None] * len(module.kernel_size))] if isinstance(module, _CONVOLUTIONS) else factor


def refuse_layer(writing: Writing, site: Site, layers: Layers) -> None:
    """Refuses a target on which PEFT has no effect, or that it cannot have.

    Raises:
        CheckpointError: if it is one.
    """
    if site.module.target_never_called:
        raise writing.impossible(
            f"the module around {site.path} reads its weight directly, where {writing.library} has no effect"
        )
    if not layers.include(site.target):
        kind = type(site.target).__name__
        raise writing.impossible(f"{site.path} is a {kind}, for which {writing.library} has no {writing.method(site)}")


def target_options(backbone: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Returns the fields of a config of PEFT that name the modules."""
    others = (path for path, _ in own_modules(backbone) if path not in targets)
    return {
        "target_modules": pattern_of(list(targets), others, "."),
        "fan_in_fan_out": all(map(is_conv1d, targets.values())),
    }


def pattern_of(names: list[str], others: Iterable[str], before: str) -> list[str] | str:
    """Returns names of modules as a list, which PEFT takes for ends of paths; a pattern if others have the same ends."""
    ends = tuple(before + name for name in names)
    return "|".join(map(re.escape, names)) if any(path.endswith(ends) for path in others) else names
