"""CommonStructureMap: the common names of a backbone."""

from torch import nn

from deltakit.errors import OptionError
from deltakit.opendelta.common_names import STRUCTURES, common_names


class CommonStructureMap:
    """Translates paths of one backbone into OpenDelta's common names."""

    def __init__(self, backbone: nn.Module) -> None:
        self.names = common_names(backbone)

    @classmethod
    def load(cls, backbone_model: nn.Module, **_: object) -> "CommonStructureMap":
        """Returns the map of a backbone.

        Raises:
            OptionError: if none of its classes has common names.
        """
        found = cls(backbone_model)
        if not found.names:
            raise OptionError(
                f"{type(backbone_model).__name__}: no common names; the classes that have them are {', '.join(STRUCTURES)}; "
                "name the modules of the model itself"
            )
        return found

    def transform(self, org_key: str, strict: bool = True, **_: object) -> str:
        """Returns the common name of a path; the path itself if it has none."""
        return self.names.get(org_key, (org_key,))[-1]


def transform(org_key: str, mapping: CommonStructureMap, strict: bool = True, **_: object) -> str:
    """Returns the common name of a path; the path itself if it has none."""
    return mapping.transform(org_key, strict)
