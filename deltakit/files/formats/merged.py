"""Refuses to read or write values that depend on weights that are not there, or into which a delta is merged."""

from collections.abc import Iterable

from torch import Tensor, nn

from deltakit.core import records_of
from deltakit.errors import CheckpointError


def refuse_merged(backbone: nn.Module, names: Iterable[str], where: str, stores: str) -> None:
    """Refuses weights that are not the backbone's own, because a delta is merged into them.

    Args:
        names: the names of a weight: several if it is tied.
        where: what the error message begins with.
        stores: what the format has with the weight's values, such as "DoRA with the norms of".

    Raises:
        CheckpointError: if a delta is merged into it.
    """
    records = records_of(backbone)
    for name in names:
        merged = next((record for record in records if name in record.weights_before_merge), None)
        if merged is not None:
            raise CheckpointError(
                f"{where}: its format stores {stores} {name}, and delta {merged.name!r} is merged into that; unmerge() it "
                "first"
            )


def refuse_unknown(name: str, tensor: Tensor | None, where: str, stores: str) -> None:
    """Refuses a tensor of the backbone that has no values here.

    Args:
        name: its name.
        tensor: the tensor; None if the module holds it in another way.
        where: what the error message begins with.
        stores: what the format has with its values, as for `refuse_merged`.

    Raises:
        CheckpointError: if it is on the meta device.
    """
    if tensor is not None and tensor.is_meta:
        raise unknown(name, where, stores)


def unknown(name: str, where: str, stores: str) -> CheckpointError:
    """Returns the error for a tensor of the backbone whose values are needed and unknown; see `refuse_unknown`."""
    return CheckpointError(
        f"{where}: its format stores {stores} {name}, which are unknown here (meta device, offload or an unknown quantizer); "
        "use a backbone whose weights are in memory"
    )
