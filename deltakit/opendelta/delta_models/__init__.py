"""The model classes, one for each type of delta."""

from deltakit.opendelta.delta_models.adapter import AdapterConfig, AdapterModel
from deltakit.opendelta.delta_models.bitfit import BitFitConfig, BitFitModel
from deltakit.opendelta.delta_models.compacter import CompacterConfig, CompacterModel
from deltakit.opendelta.delta_models.lora import LoraConfig, LoraModel
from deltakit.opendelta.delta_models.low_rank_adapter import LowRankAdapterConfig, LowRankAdapterModel
from deltakit.opendelta.delta_models.parallel_adapter import ParallelAdapterConfig, ParallelAdapterModel
from deltakit.opendelta.delta_models.prefix import PrefixConfig, PrefixModel
from deltakit.opendelta.delta_models.soft_prompt import SoftPromptConfig, SoftPromptModel

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "BitFitConfig",
    "BitFitModel",
    "CompacterConfig",
    "CompacterModel",
    "LoraConfig",
    "LoraModel",
    "LowRankAdapterConfig",
    "LowRankAdapterModel",
    "ParallelAdapterConfig",
    "ParallelAdapterModel",
    "PrefixConfig",
    "PrefixModel",
    "SoftPromptConfig",
    "SoftPromptModel",
]
