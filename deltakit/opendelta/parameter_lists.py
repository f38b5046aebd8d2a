"""ParameterLists: which parameters are trained and which are frozen, as OpenDelta's model classes tell it."""

from collections.abc import Iterator

from torch import nn


class ParameterLists(nn.Module):
    """Counts and names of parameters."""

    backbone_model: nn.Module

    def trainable_parameters(self, module: nn.Module | None = None) -> Iterator[nn.Parameter]:
        """Yields the parameters of a module (None: of the delta) that require gradients."""
        return (p for p in (self if module is None else module).parameters() if p.requires_grad)

    def num_trainable_parameters(self, module: nn.Module | None = None) -> int:
        """Returns the number of trained values of a module (None: of the delta)."""
        return sum(parameter.numel() for parameter in self.trainable_parameters(module))

    def num_total_parameters(self, module: nn.Module | None = None) -> int:
        """Returns the number of values in the parameters of a module (None: of the delta)."""
        return sum(parameter.numel() for parameter in (self if module is None else module).parameters())

    def trainable_parameters_names(self, module: nn.Module | None = None) -> Iterator[str]:
        """Yields the names of the parameters of a module (None: of the backbone) that require gradients."""
        module = self.backbone_model if module is None else module
        return (name for name, parameter in module.named_parameters() if parameter.requires_grad)

    def frozen_parameters_names(self, module: nn.Module | None = None) -> Iterator[str]:
        """Yields the names of the parameters of a module (None: of the backbone) that require no gradients."""
        module = self.backbone_model if module is None else module
        return (name for name, parameter in module.named_parameters() if not parameter.requires_grad)
