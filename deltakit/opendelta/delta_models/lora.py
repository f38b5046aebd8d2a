"""LoRA with OpenDelta's names."""

from typing import Any

from torch import nn

from deltakit.core import checked
from deltakit.methods.lora import LoRA
from deltakit.methods.lora import LoRADelta as LowRankLinear
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_configs import BaseDeltaConfig
from deltakit.opendelta.matching import Selectors

__all__ = ["LoraConfig", "LoraModel", "LowRankLinear"]


class LoraConfig(BaseDeltaConfig):
    """The options of `LoraModel`."""

    delta_type = "lora"
    method = LoRA
    renamed = {"lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}  # noqa: RUF012  # as declared

    def __init__(self, lora_r: int = 8, lora_alpha: float = 16, lora_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lora_r, self.lora_alpha, self.lora_dropout = lora_r, lora_alpha, lora_dropout


@checked
class LoraModel(DeltaBase):
    """LoRA with OpenDelta's options, attached at once. Raises what `attach` raises."""

    delta_type = "lora"
    config_class = LoraConfig
    default_modified_modules = ("attn@.q@", "attn@.v@")

    def __init__(
        self,
        backbone_model: nn.Module,
        lora_r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        modified_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        exclude_modules: Selectors = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
        backend: str = "hf",
    ) -> None:
        self._attach_with(locals())
