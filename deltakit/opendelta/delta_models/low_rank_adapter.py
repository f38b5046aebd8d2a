"""Low-rank adapters with OpenDelta's names."""

from typing import Any

from torch import nn

from deltakit.core import checked
from deltakit.errors import warn
from deltakit.methods.low_rank_adapter import LowRankAdapter as Method
from deltakit.methods.low_rank_adapter import LowRankAdapterDelta as LowRankAdapter
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_models.bottleneck import BottleneckConfig
from deltakit.opendelta.matching import Selectors

__all__ = ["LowRankAdapter", "LowRankAdapterConfig", "LowRankAdapterModel"]


class LowRankAdapterConfig(BottleneckConfig):
    """The options of `LowRankAdapterModel`."""

    delta_type = "low_rank_adapter"
    method = Method
    renamed = {"reduction_factor": "reduction", "low_rank_rank": "r"}  # noqa: RUF012  # as declared

    def __init__(
        self,
        reduction_factor: int = 32,
        non_linearity: str = "gelu_new",
        low_rank_w_init: str = "glorot-uniform",
        low_rank_rank: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.reduction_factor, self.non_linearity = reduction_factor, non_linearity
        self.low_rank_w_init, self.low_rank_rank = low_rank_w_init, low_rank_rank


@checked
class LowRankAdapterModel(DeltaBase):
    """Low-rank adapters with OpenDelta's options, attached at once. Raises what `attach` raises.

    Start values are deltakit's; another `low_rank_w_init` than the default is a warning.
    """

    delta_type = "low_rank_adapter"
    config_class = LowRankAdapterConfig
    default_modified_modules = ("attn@.proj@", "ff@.w2@")

    def __init__(
        self,
        backbone_model: nn.Module,
        reduction_factor: int = 32,
        non_linearity: str = "gelu_new",
        low_rank_w_init: str = "glorot-uniform",
        low_rank_rank: int = 1,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
        backend: str = "hf",
    ) -> None:
        if low_rank_w_init != "glorot-uniform":
            warn(f"LowRankAdapterModel(low_rank_w_init={low_rank_w_init!r}): the start values are Glorot-uniform")
        self._attach_with(locals())
