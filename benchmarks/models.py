"""Builds every model type of the installed transformers from its default config, on the meta device."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Default configs that do not build, each with the smallest change that makes it build.
CHANGES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 7},
    "informer": {"prediction_length": 7},
    "time_series_transformer": {"prediction_length": 7},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "funnel": {"block_repeats": [1, 1, 1]},
    "lfm2_moe": {"layer_types": ["full_attention"] * 32},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "conditional_detr": {"use_timm_backbone": False, "backbone_config": {"model_type": "resnet"}},
    "dab-detr": {"use_timm_backbone": False, "backbone_config": {"model_type": "resnet"}},
    "deformable_detr": {"use_timm_backbone": False, "backbone_config": {"model_type": "resnet"}},
    "detr": {"use_timm_backbone": False, "backbone_config": {"model_type": "resnet"}},
    "table-transformer": {"use_timm_backbone": False, "backbone_config": {"model_type": "resnet"}},
    "omdet-turbo": {"use_timm_backbone": False, "backbone_config": {"model_type": "swin"}},
}


@dataclass(frozen=True)
class Built:
    """A model on the meta device and the class that built it; or None and the reason why nothing could."""

    model: nn.Module | None
    how: str


def model_types() -> list[str]:
    """Returns all model types that have a config."""
    return sorted(CONFIG_MAPPING.keys())


def build(model_type: str) -> Built:
    """Builds the model of a type with `AutoModel`, another auto class, or the model class of its config."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            config = CONFIG_MAPPING[model_type](**CHANGES.get(model_type, {}))
        except Exception as error:
            return Built(None, _reason(error))
        reasons = []
        for how, make in _makers(config):
            try:
                return Built(make(config), how + (" (changed config)" if model_type in CHANGES else ""))
            except Exception as error:
                reasons.append(_reason(error))
    return Built(None, reasons[0] if reasons else "a config without a model class")


def _makers(config: Any) -> Any:
    autos = ["AutoModel", *sorted(name for name in dir(transformers) if name.startswith("AutoModelFor"))]
    for name in autos:
        auto = getattr(transformers, name)
        if type(config) in getattr(auto, "_model_mapping", {}):
            yield name, auto.from_config
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        found = vars(__import__(module, fromlist=["*"]))
    except ImportError:
        return
    for name, kind in found.items():
        own = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.__module__ == module
        if own and kind.config_class is type(config) and not name.endswith("PreTrainedModel"):
            yield name, kind


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) and "requires the" in text:
        return f"needs the package {text.partition('requires the ')[2].split()[0]}"
    return f"does not build: {type(error).__name__}: {text[:100]}"
