"""A delta that is written in the format of another library."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from deltakit.core import Attachment, Site
from deltakit.errors import CheckpointError


class Writing(NamedTuple):
    """The delta, the tensors of its state dict, and what error messages call the library and what it has."""

    attachment: Attachment
    tensors: Mapping[str, Tensor]
    library: str
    """Such as "PEFT"."""
    what: str
    """Such as "an adapter of PEFT"."""

    def tensor(self, site: Site, name: str) -> Tensor:
        """Returns a tensor of a delta module, by its name there."""
        return self.tensors[self.attachment.named(site, name)]

    def method(self, site: Site) -> str:
        """Returns the name of the method that a delta module is of."""
        return self.attachment.record.methods[site.method].name

    def impossible(self, why: str) -> CheckpointError:
        """Returns the error for a delta that the format has no place for."""
        name = self.attachment.record.name
        return CheckpointError(
            f"delta {name!r} cannot be saved as {self.what}: {why}; save it in the format 'deltakit'"
        )
