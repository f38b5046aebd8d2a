"""OpenDelta's names, so that code written for it runs with `opendelta` replaced by `deltakit`.

The defaults are OpenDelta's: its models attach at once and freeze nothing until `freeze_module` is called.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from deltakit.core import Method
from deltakit.delta import Delta, attach, load
from deltakit.errors import OptionError
from deltakit.methods.adapter import Adapter
from deltakit.methods.bitfit import BitFit
from deltakit.methods.lora import LoRA
from deltakit.methods.prefix import Prefix
from deltakit.methods.soft_prompt import SoftPrompt
from deltakit.view import share, show

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_orig": "gelu", "swish": "silu"}

Selectors = Sequence[str] | None


class DeltaModel:
    """A delta with OpenDelta's methods. `delta` is the handle itself."""

    delta_type: ClassVar[str] = ""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.backbone_model = delta.backbone

    @classmethod
    def _attached(cls, backbone_model: nn.Module, method: Method) -> Delta:
        return attach(backbone_model, method, freeze=False)

    def freeze_module(self, exclude: Sequence[str] = ("deltas",)) -> None:
        """Freezes the backbone but for the modules in `exclude`, which are then trained whole and saved with the delta."""
        self.delta.freeze(train=[name for name in exclude if name != "deltas"])

    def attach(self) -> None:
        """Puts the delta back."""
        self.delta.attach()

    def detach(self) -> None:
        """Takes the delta off; the backbone is bit for bit as it was."""
        self.delta.detach()

    def save_finetuned(self, finetuned_delta_path: str | PathLike[str] = "./delta_checkpoints/") -> Path:
        """The folder in which the delta was saved."""
        return self.delta.save(finetuned_delta_path)

    def log(self) -> None:
        """Prints the tree and how much is trained."""
        print(show(self.backbone_model))
        total = sum(parameter.numel() for parameter in self.backbone_model.parameters())
        trained = sum(p.numel() for p in self.backbone_model.parameters() if p.requires_grad)
        print(
            f"trainable {share(trained, total)}, delta {share(self.delta.num_parameters, total)} of {total:,} parameters"
        )


class LoraModel(DeltaModel):
    """LoRA by OpenDelta's options."""

    delta_type = "lora"

    def __init__(
        self,
        backbone_model: nn.Module,
        *,
        lora_r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
    ) -> None:
        options: dict[str, Any] = {"r": lora_r, "alpha": lora_alpha, "dropout": lora_dropout}
        super().__init__(self._attached(backbone_model, LoRA(**options, at=modified_modules, exclude=exclude_modules)))


class AdapterModel(DeltaModel):
    """Adapters by OpenDelta's options."""

    delta_type = "adapter"

    def __init__(
        self,
        backbone_model: nn.Module,
        *,
        bottleneck_dim: int = 24,
        non_linearity: str = "gelu_new",
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
    ) -> None:
        activation = _ACTIVATIONS.get(non_linearity, non_linearity)
        method = Adapter(size=bottleneck_dim, activation=activation, at=modified_modules, exclude=exclude_modules)
        super().__init__(self._attached(backbone_model, method))


class BitFitModel(DeltaModel):
    """BitFit by OpenDelta's options."""

    delta_type = "bitfit"

    def __init__(
        self, backbone_model: nn.Module, *, modified_modules: Selectors = None, exclude_modules: Selectors = None
    ) -> None:
        super().__init__(self._attached(backbone_model, BitFit(at=modified_modules, exclude=exclude_modules)))


class PrefixModel(DeltaModel):
    """Prefix tuning by OpenDelta's options."""

    delta_type = "prefix"

    def __init__(
        self,
        backbone_model: nn.Module,
        *,
        prefix_token_num: int = 6,
        reparameterize: bool = True,
        mid_dim: int = 512,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
    ) -> None:
        options: dict[str, Any] = {"tokens": prefix_token_num, "reparam": reparameterize, "hidden": mid_dim}
        super().__init__(
            self._attached(backbone_model, Prefix(**options, at=modified_modules, exclude=exclude_modules))
        )


class SoftPromptModel(DeltaModel):
    """A soft prompt by OpenDelta's options."""

    delta_type = "soft_prompt"

    def __init__(self, backbone_model: nn.Module, *, soft_token_num: int = 100, token_init: bool = True) -> None:
        method = SoftPrompt(tokens=soft_token_num, init="vocab" if token_init else "random")
        super().__init__(self._attached(backbone_model, method))


_MODELS = {kind.delta_type: kind for kind in (LoraModel, AdapterModel, BitFitModel, PrefixModel, SoftPromptModel)}


@dataclass
class AutoDeltaConfig:
    """The type of a delta and its options, under OpenDelta's names."""

    delta_type: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> "AutoDeltaConfig":
        """The config that `{"delta_type": "lora", "lora_r": 8}` describes.

        Raises:
            OptionError: if there is no such type.
        """
        delta_type = config_dict.get("delta_type")
        if delta_type not in _MODELS:
            raise OptionError(f"delta_type {delta_type!r}: expected one of {', '.join(_MODELS)}")
        return cls(delta_type, {key: value for key, value in config_dict.items() if key != "delta_type"})


class AutoDeltaModel:
    """Deltas from a config, or from what was saved."""

    @staticmethod
    def from_config(config: AutoDeltaConfig, *, backbone_model: nn.Module) -> DeltaModel:
        """The delta that a config describes, attached.

        Raises:
            OptionError: if the type has no such option.
        """
        kind = _MODELS[config.delta_type]
        try:
            return kind(backbone_model, **config.options)
        except TypeError as error:
            raise OptionError(f"{kind.__name__}: {error}; its options are keyword arguments of that class") from error

    @staticmethod
    def from_finetuned(
        finetuned_model_name_or_path: str | PathLike[str],
        *,
        backbone_model: nn.Module,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> DeltaModel:
        """The delta saved in a folder or a Hub repository, attached."""
        delta = load(finetuned_model_name_or_path, backbone_model, token=token, revision=revision, freeze=False)
        kind = _MODELS.get(delta.methods[0].name, DeltaModel) if len(delta.methods) == 1 else DeltaModel
        model = kind.__new__(kind)
        DeltaModel.__init__(model, delta)
        return model
