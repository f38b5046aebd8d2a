"""Where the parameters of a module are, and their dtype."""

import torch
from torch import nn

from deltakit.errors import StateError


def get_device(module: nn.Module | nn.Parameter) -> torch.device | None:
    """Returns the device of a module's parameters; None if it has none.

    Raises:
        StateError: if they are on several devices.
    """
    found = {parameter.device for parameter in _parameters(module)}
    if len(found) > 1:
        raise StateError(f"{type(module).__name__}: its parameters are on several devices; ask a module in it")
    return next(iter(found), None)


def get_dtype(module: nn.Module | nn.Parameter) -> torch.dtype | None:
    """Returns the dtype of a module's parameters; None if it has none.

    Raises:
        StateError: if they have several.
    """
    found = {parameter.dtype for parameter in _parameters(module)}
    if len(found) > 1:
        raise StateError(f"{type(module).__name__}: its parameters have several dtypes; ask a module in it")
    return next(iter(found), None)


def _parameters(module: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [module] if isinstance(module, nn.Parameter) else list(module.parameters())
