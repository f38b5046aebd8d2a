"""What the forwards of embeddings and convolutions do beside a plain look-up or product."""

from torch import nn

from deltakit.core import Target
from deltakit.errors import TargetError

_KINDS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def has_own_forward(module: nn.Module) -> bool:
    """Returns whether it is of a subclass of torch's embedding or convolution that has a forward of its own."""
    if not isinstance(module, _KINDS):
        return False
    return any(isinstance(module, kind) and type(module).forward is not kind.forward for kind in _KINDS)


def refuse_max_norm(target: Target, method: str) -> None:
    """Refuses an embedding that changes its own weight.

    Args:
        method: the name of the method, for the error message.

    Raises:
        TargetError: if it does.
    """
    if isinstance(target.module, nn.Embedding) and target.module.max_norm is not None:
        raise TargetError(
            f"{target.named}: {method} expects an embedding without max_norm, which rewrites its weight in each forward; "
            "leave it out with exclude="
        )
