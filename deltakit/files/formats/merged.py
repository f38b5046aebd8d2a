"""Refuses to read or write values that depend on weights into which a delta is merged."""

from collections.abc import Iterable

from torch import nn

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
