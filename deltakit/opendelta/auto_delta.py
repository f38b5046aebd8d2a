"""AutoDeltaConfig and AutoDeltaModel: the class of a config or of a model is that of its `delta_type`."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from deltakit.delta import Delta
from deltakit.errors import OptionError
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_configs import BaseDeltaConfig
from deltakit.opendelta.delta_models.adapter import AdapterModel
from deltakit.opendelta.delta_models.bitfit import BitFitModel
from deltakit.opendelta.delta_models.compacter import CompacterModel
from deltakit.opendelta.delta_models.lora import LoraModel
from deltakit.opendelta.delta_models.low_rank_adapter import LowRankAdapterModel
from deltakit.opendelta.delta_models.parallel_adapter import ParallelAdapterModel
from deltakit.opendelta.delta_models.prefix import PrefixModel
from deltakit.opendelta.delta_models.soft_prompt import SoftPromptModel

MODELS: Mapping[str, type[DeltaBase]] = {
    kind.delta_type: kind
    for kind in (
        LoraModel,
        AdapterModel,
        BitFitModel,
        PrefixModel,
        SoftPromptModel,
        LowRankAdapterModel,
        CompacterModel,
        ParallelAdapterModel,
    )
}
"""The model classes by their `delta_type`."""


def _kind(delta_type: object) -> type[DeltaBase]:
    kind = MODELS.get(delta_type) if isinstance(delta_type, str) else None
    if kind is None:
        raise OptionError(f"AutoDeltaConfig: unknown delta_type {delta_type!r}; use one of {', '.join(MODELS)}")
    return kind


class AutoDeltaConfig:
    """Makes the config for a `delta_type`. It has no instances."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OptionError("AutoDeltaConfig has no instances: call AutoDeltaConfig.from_dict or from_finetuned")

    @staticmethod
    def from_dict(config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Returns the config for a dictionary such as `{"delta_type": "lora", "lora_r": 8}`; other keys are a warning.

        Raises:
            OptionError: if the type is missing or unknown.
        """
        if not isinstance(config_dict, Mapping):
            raise OptionError(
                f"AutoDeltaConfig.from_dict: expected a dictionary, found a {type(config_dict).__name__}; write vars(args) "
                "for the result of argparse, and dataclasses.asdict for a dataclass"
            )
        given = {**config_dict, **kwargs}
        return _kind(given.get("delta_type")).config_class.from_dict(given)

    @staticmethod
    def from_finetuned(finetuned_delta_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Returns the config in a folder that OpenDelta or deltakit wrote. `kwargs` come before what is in it.

        Raises:
            CheckpointError: if there is no config, or it is damaged.
            OptionError: if its type is unknown.
        """
        found = BaseDeltaConfig.get_config_dict(finetuned_delta_path)
        kind = _kind(found.get("method", found.get("delta_type")))
        return kind.config_class.from_finetuned(finetuned_delta_path, **kwargs)


class AutoDeltaModel:
    """Makes deltas from a config or from saved files. It has no instances."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OptionError("AutoDeltaModel has no instances: call AutoDeltaModel.from_config or from_finetuned")

    @staticmethod
    def from_config(config: BaseDeltaConfig, backbone_model: nn.Module, **kwargs: Any) -> Any:
        """Attaches the delta that a config describes, and returns it. Other keywords have no effect, which is a warning.

        Raises:
            OptionError: if this is no config, or a value is out of its range.
            TargetError: if the method cannot be attached to a module that the names match.
        """
        if not isinstance(config, BaseDeltaConfig) or not config.delta_type:
            raise OptionError(
                f"AutoDeltaModel.from_config: expected a config, found a {type(config).__name__}; make one with "
                "AutoDeltaConfig.from_dict"
            )
        return _kind(config.delta_type).from_config(config, backbone_model, **kwargs)

    @staticmethod
    def from_finetuned(
        finetuned_delta_path: str | PathLike[str] = "",
        backbone_model: nn.Module | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Loads a delta from a folder or a Hub repository, attaches it and returns it.

        The options are those of `DeltaBase.from_finetuned`, and so are the errors. The result has the class of the delta's
        type; a delta of several methods is a `DeltaBase`.
        """
        return _Any.from_finetuned(finetuned_delta_path, backbone_model, *args, **kwargs)


class _Any(DeltaBase):
    """Loads a delta of any type."""

    public_name = "AutoDeltaModel"

    @classmethod
    def _of(cls, delta: Delta, source: str | PathLike[str]) -> Any:
        first, *others = {method.name for method in delta.methods}
        kind = DeltaBase if others else MODELS.get(first, DeltaBase)
        return kind._of(delta, source)
