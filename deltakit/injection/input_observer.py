"""Observes the inputs of some modules while the user runs batches, for start values that come from data."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import hidden_input
from deltakit.injection.call_observer import mask_of


class _Mask:
    """The attention mask of the backbone's current call."""

    value: Tensor | None = None

    def begin(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.value = mask_of(backbone, args, kwargs)

    def end(self, backbone: nn.Module, args: Any, output: Any) -> None:
        self.value = None


class _Input:
    """Hands the input of one module on."""

    def __init__(self, name: str, mask: _Mask, notice: Callable[[str, Tensor], None]) -> None:
        self.name, self.mask, self.notice = name, mask, notice

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            self.notice(self.name, _vectors(hidden_input(args, kwargs).detach(), self.mask.value))


@contextmanager
def observed_inputs(
    backbone: nn.Module, modules: Mapping[str, nn.Module], notice: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Calls `notice` with a name and the input vectors [tokens, d] in each call of a module, inside a `with` block.

    Tokens that the backbone's attention mask hides are left out.

    Args:
        modules: what is observed, by name.
    """
    mask = _Mask()

    handles = [
        backbone.register_forward_pre_hook(mask.begin, with_kwargs=True),
        backbone.register_forward_hook(mask.end, always_call=True),
    ]
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(_Input(name, mask, notice), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _vectors(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.ndim == 3 and mask.shape == x.shape[:2]:
        return x[mask.to(x.device).bool()]
    return x.reshape(-1, x.shape[-1])
