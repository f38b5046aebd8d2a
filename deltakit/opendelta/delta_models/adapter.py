"""Adapters with OpenDelta's names."""

from typing import Any, ClassVar

from torch import nn

from deltakit.core import checked
from deltakit.methods.adapter import Adapter
from deltakit.methods.adapter import AdapterDelta as AdapterLayer
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_models.bottleneck import BottleneckConfig
from deltakit.opendelta.matching import Selectors

__all__ = ["AdapterConfig", "AdapterLayer", "AdapterModel"]


class AdapterConfig(BottleneckConfig):
    """The options of `AdapterModel`."""

    delta_type = "adapter"
    method: ClassVar[Any] = Adapter
    renamed = {"bottleneck_dim": "size"}  # noqa: RUF012  # as declared

    def __init__(self, bottleneck_dim: int = 24, non_linearity: str = "gelu_new", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bottleneck_dim, self.non_linearity = bottleneck_dim, non_linearity


@checked
class AdapterModel(DeltaBase):
    """Adapters with OpenDelta's options, attached at once. Raises what `attach` raises."""

    delta_type = "adapter"
    config_class = AdapterConfig
    default_modified_modules = ("attn@.proj@", "ff@.w2@")

    def __init__(
        self,
        backbone_model: nn.Module,
        bottleneck_dim: int = 24,
        non_linearity: str = "gelu_new",
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
        backend: str = "hf",
    ) -> None:
        self._attach_with(locals())
