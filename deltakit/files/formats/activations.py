"""The activations of adapters in the files of other libraries."""

from pathlib import Path

from deltakit.errors import CheckpointError

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_orig": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leakyrelu": "leaky_relu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""What transformers, OpenDelta and AdapterHub call the activations that deltakit has."""


def activation_of(name: str, where: Path) -> str:
    """Returns what deltakit calls an activation.

    Raises:
        CheckpointError: if deltakit does not have it.
    """
    if name.lower() not in _ACTIVATIONS:
        raise CheckpointError(
            f"{where}: its adapters have the activation {name!r}, which deltakit does not have; it has "
            f"{', '.join(sorted(set(_ACTIVATIONS.values())))}"
        )
    return _ACTIVATIONS[name.lower()]
