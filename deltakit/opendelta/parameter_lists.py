"""ParameterLists: which parameters are trained and which are frozen, as OpenDelta's model classes tell it."""

from collections.abc import Iterator

from torch import nn

from deltakit.delta import Delta
from deltakit.errors import StateError


class ParameterLists(nn.Module):
    """Counts and names of parameters."""

    backbone_model: nn.Module
    delta: Delta | None

    @property
    def trainable(self) -> bool:
        """Whether the parameters of the delta require gradients, as of deltakit's handle. Can be set.

        Raises:
            StateError: if it is set and there is no delta, because the names matched nothing.
        """
        return self.delta is not None and self.delta.trainable

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        self._delta().trainable = trainable

    def _delta(self) -> Delta:
        if self.delta is None:
            raise StateError(f"this {type(self).__name__} matched no module, so it has no delta; name others")
        return self.delta

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
