"""The activations with OpenDelta's names."""

from collections.abc import Mapping

from torch import Tensor, nn

from deltakit.ops import ACTIVATIONS

OURS: Mapping[str, str] = {
    "gelu_new": "gelu_tanh",
    "gelu_orig": "gelu",
    "swish": "silu",
    "leakyrelu": "leaky_relu",
}
"""OpenDelta's names of activations, each with deltakit's where it has another."""

THEIRS: Mapping[str, str] = {ours: theirs for theirs, ours in OURS.items()}


def activation_name(non_linearity: str) -> str:
    """Returns deltakit's name of an activation, in whatever case OpenDelta's is written.

    >>> activation_name("GELU_new"), activation_name("relu")
    ('gelu_tanh', 'relu')
    """
    name = non_linearity.lower()
    return OURS.get(name, name)


def opendelta_name(activation: str) -> str:
    """Returns OpenDelta's name of an activation."""
    return THEIRS.get(activation, activation)


class Activations(nn.Module):
    """An activation by its name, as a module."""

    def __init__(self, activation_type: str) -> None:
        super().__init__()
        self.activation_type = activation_type
        self.f = ACTIVATIONS[activation_name(activation_type)]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the activation of each value."""
        return self.f(x)
