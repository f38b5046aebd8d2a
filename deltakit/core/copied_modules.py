"""Copies of modules that share their tensors with the original."""

from typing import Any

from torch import nn

COMPUTED = "parametrizations"
"""The child in which torch's parametrizations keep what a weight or bias is computed from."""


def shallow_copy(module: nn.Module) -> Any:
    """Returns a module with the attributes of another one, and the same tables of parameters, buffers and children."""
    copy = object.__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    return copy


def at_rest(module: nn.Module) -> nn.Module:
    """Returns a module whose parametrized weights are those of its last call.

    In training each read of a weight with `spectral_norm` is one more step of its power iteration: the weight would be another
    one than the call's, and the backbone's buffers would move.
    """
    computed = module._modules.get(COMPUTED)
    if computed is None or not computed.training:
        return module
    copy: nn.Module = shallow_copy(module)
    copy._modules = {**module._modules, COMPUTED: _evaluating(computed)}
    return copy


def _evaluating(module: nn.Module | None) -> nn.Module | None:
    if module is None:
        return None
    copy: nn.Module = shallow_copy(module)
    copy.training = False
    copy._modules = {name: _evaluating(child) for name, child in module._modules.items()}
    return copy
