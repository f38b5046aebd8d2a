"""Makes gradients reach the deltas of blocks under reentrant checkpointing.

Reentrant checkpointing computes no gradients if no input of a block requires them, which is the case when everything below is
frozen. So a block with deltas gets a hook that makes its input require them, but only once it is checkpointed: a hook on each
block, in each forward, took a fortieth of a forward of one token through 24 small blocks (measured).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltakit.injection.tables import ours, stand


class InputGradients:
    """A hook on a checkpointed block with deltas: makes its input require gradients.

    No other blocks get it, so that the backward pass still stops at the lowest delta.
    """

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> Any:
        if not (block.training and getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled()):
            return None
        options = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
        if not options.get("use_reentrant", True):
            return None
        if not args or not isinstance(args[0], torch.Tensor) or args[0].requires_grad:
            return None
        if not torch.is_floating_point(args[0]):
            return None
        return (args[0].detach().requires_grad_(), *args[1:])


class NewlyCheckpointed:
    """A hook on the module that calls blocks with deltas: looks which of them are checkpointed since a delta was attached.

    transformers says so in an attribute of each block, and training scripts often switch it on after they attach a delta.
    """

    def __init__(self) -> None:
        self.blocks: list[nn.Module] = []

    def __call__(self, caller: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        for block in self.blocks:
            if getattr(block, "gradient_checkpointing", False):
                _hook(block, wanted=True)


def can_be_checkpointed(module: nn.Module) -> bool:
    """Returns whether a module is a block that transformers can compute again in the backward pass."""
    return hasattr(type(module), "gradient_checkpointing")


def follow_block(block: nn.Module, *, has_deltas: bool, called: bool) -> None:
    """Registers or removes the hook of a block.

    Args:
        called: whether a module around it calls it, and looks for newly checkpointed blocks.
    """
    _hook(block, wanted=has_deltas and (not called or getattr(block, "gradient_checkpointing", False)))


def follow_caller(caller: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Registers or removes the hook of a module that calls blocks.

    Args:
        blocks: those with deltas.
    """
    stand(NewlyCheckpointed, caller, caller.register_forward_pre_hook, wanted=bool(blocks))
    for hook in ours(caller, NewlyCheckpointed):
        hook.blocks = list(blocks)


def _hook(block: nn.Module, *, wanted: bool) -> None:
    stand(InputGradients, block, block.register_forward_pre_hook, wanted=wanted)
