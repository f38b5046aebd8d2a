"""What a delta is made of and what it trains: the half of the handle that changes nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deltakit.core import Attachment, DeltaModule, Method
from deltakit.delta import tensors
from deltakit.selection import BackboneIndex
from deltakit.view import described


class DeltaContents:
    """The parts of one delta on one backbone."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._record = attachment.record

    @property
    def backbone(self) -> nn.Module:
        """The model that the delta belongs to."""
        return self._attachment.backbone

    @property
    def name(self) -> str:
        """The delta's name among those on its backbone."""
        return self._record.name

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that the delta was made of, with their options."""
        return self._record.methods

    @property
    def modules(self) -> dict[str, list[DeltaModule]]:
        """The delta modules by the path of their target."""
        return self.modules_of(None)

    def modules_of(self, method: str | None) -> dict[str, list[DeltaModule]]:
        """The delta modules of the methods of one name, by the path of their target; of all methods for None."""
        found: dict[str, list[DeltaModule]] = {}
        for site in self._attachment.sites:
            if method in (None, self.methods[site.method].name):
                found.setdefault(site.path, []).append(site.module)
        return found

    @property
    def fully_trained(self) -> list[str]:
        """The names of the backbone's tensors that the delta trains fully and saves."""
        return self._record.fully_trained

    @property
    def attached(self) -> bool:
        """Whether the delta modules are in the backbone."""
        return self._attachment.attached

    @property
    def merged(self) -> bool:
        """Whether the delta is merged into the backbone's weights."""
        return self._record.merged

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything the delta trains, by the names of its file: its modules' parameters and what it trains fully."""
        return tensors.named_parameters(self._attachment)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything the delta trains: what an optimiser takes."""
        return (parameter for _, parameter in self.named_parameters())

    def parameter_groups(self, **by_tag: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Everything the delta trains, as groups for an optimiser: `delta.parameter_groups(up={"lr": 1e-3})` (LoRA+).

        Args:
            by_tag: options for the parameters with a tag: "down" and "up" of LoRA, "fully_trained" of `train=`.

        Raises:
            OptionError: if no parameter has that tag.
        """
        return tensors.parameter_groups(self._attachment, by_tag)

    @property
    def num_parameters(self) -> int:
        """How many numbers the delta trains, those of fully trained modules included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The delta's tensors as its file holds them: path, method and parameter name; never the delta's name.

        Raises:
            StateError: if this process has only a part of the delta (FSDP1, DeepSpeed ZeRO-3).
        """
        return tensors.state_dict(self._attachment)

    def __repr__(self) -> str:
        return described(self._attachment, trained=self.num_parameters, names=BackboneIndex(self.backbone).names)
