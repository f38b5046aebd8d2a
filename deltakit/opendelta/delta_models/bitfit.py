"""BitFit with OpenDelta's names."""

from torch import nn

from deltakit.core import checked
from deltakit.methods.bitfit import BitFit
from deltakit.methods.bitfit import BitFitDelta as BiasLayer
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_configs import BaseDeltaConfig
from deltakit.opendelta.matching import Selectors

__all__ = ["BiasLayer", "BitFitConfig", "BitFitModel"]


class BitFitConfig(BaseDeltaConfig):
    """The options of `BitFitModel`: those that all deltas have."""

    delta_type = "bitfit"
    method = BitFit


@checked
class BitFitModel(DeltaBase):
    """BitFit with OpenDelta's options, attached at once. Raises what `attach` raises."""

    delta_type = "bitfit"
    config_class = BitFitConfig
    default_modified_modules = ("attn@", "ff@", "layer_norm@", "lm_head@.proj@")

    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
        backend: str = "hf",
    ) -> None:
        self._attach_with(locals())
