"""BottleneckConfig: what the configs of all kinds of adapters share."""

from collections.abc import Mapping
from typing import Any

from deltakit.core import Method
from deltakit.opendelta.delta_configs import BaseDeltaConfig
from deltakit.opendelta.delta_models.layers.activations import activation_name, opendelta_name


class BottleneckConfig(BaseDeltaConfig):
    """The options of a kind of adapter."""

    non_linearity: str

    def method_at(self, at: Any, **options: Any) -> Method:
        """Returns deltakit's method with these options and targets, and with further options of deltakit.

        Raises:
            OptionError: if an option is out of its range.
        """
        return super().method_at(at, activation=activation_name(self.non_linearity), **options)

    @classmethod
    def options_of(cls, method: Mapping[str, Any]) -> dict[str, Any]:
        """Returns OpenDelta's options for a method as deltakit's files have it."""
        return {**super().options_of(method), "non_linearity": opendelta_name(method.get("activation", ""))}
