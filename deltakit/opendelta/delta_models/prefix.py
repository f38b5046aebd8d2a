"""Prefix tuning with OpenDelta's names."""

from typing import Any

from torch import nn

from deltakit.core import checked
from deltakit.methods.prefix import Prefix
from deltakit.methods.prefix import PrefixDelta as PrefixLayer
from deltakit.methods.prefix import PrefixMLP as ReparameterizeFunction
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_configs import BaseDeltaConfig
from deltakit.opendelta.matching import Selectors

__all__ = ["PrefixConfig", "PrefixLayer", "PrefixModel", "ReparameterizeFunction"]


class PrefixConfig(BaseDeltaConfig):
    """The options of `PrefixModel`."""

    delta_type = "prefix"
    method = Prefix
    renamed = {  # noqa: RUF012  # as declared
        "prefix_token_num": "tokens",
        "reparameterize": "reparam",
        "embed_dim": "embed",
        "mid_dim": "hidden",
    }

    def __init__(
        self,
        prefix_token_num: int = 6,
        reparameterize: bool = True,
        embed_dim: int = 512,
        mid_dim: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.prefix_token_num, self.reparameterize = prefix_token_num, reparameterize
        self.embed_dim, self.mid_dim = embed_dim, mid_dim


@checked
class PrefixModel(DeltaBase):
    """Prefix tuning with OpenDelta's options, attached at once. Raises what `attach` raises."""

    delta_type = "prefix"
    config_class = PrefixConfig
    default_modified_modules = ("attn@",)

    def __init__(
        self,
        backbone_model: nn.Module,
        prefix_token_num: int = 6,
        reparameterize: bool = True,
        embed_dim: int = 512,
        mid_dim: int = 512,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
    ) -> None:
        self._attach_with(locals())
