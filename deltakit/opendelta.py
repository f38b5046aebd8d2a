"""OpenDelta's API: code written for OpenDelta runs after importing from `deltakit.opendelta` instead of `opendelta`.

The defaults are OpenDelta's: models attach at once, and nothing is frozen until `freeze_module` is called.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from deltakit.core import DeltaModule, Method, above, checked, fold, name_of, num_parameters, records_of
from deltakit.delta import Delta, Spelling, attach, freeze_backbone, load, plan
from deltakit.errors import OptionError
from deltakit.methods.adapter import Adapter
from deltakit.methods.bitfit import BitFit
from deltakit.methods.lora import LoRA
from deltakit.methods.prefix import Prefix
from deltakit.methods.soft_prompt import SoftPrompt
from deltakit.view import share, show

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_orig": "gelu", "swish": "silu"}

_EXCLUDE = Spelling("exclude", always=("deltas",), role="", none="")

Selectors = str | Sequence[str] | None


@checked
class DeltaModel:
    """A delta with OpenDelta's methods. `delta` is deltakit's own handle."""

    delta_type: ClassVar[str] = ""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.backbone_model = delta.backbone

    @classmethod
    def _attached(cls, backbone_model: nn.Module, method: Method) -> Delta:
        if method.at is None and method.name != "soft_prompt":
            method = replace(method, at=_default_targets(backbone_model, method))
        return attach(backbone_model, method, freeze=False)

    def freeze_module(self, exclude: str | Sequence[str] = ("deltas",)) -> None:
        """Freezes the backbone except the modules in `exclude`, which are fully trained and saved with the delta.

        As in OpenDelta, the backbone stays frozen after `detach`, and for the next delta. `requires_grad_(True)` on the
        backbone, or on a part of it, ends that.

        A warning names what is new in the backbone, such as a head, and would stay frozen with random weights. Add it to
        `exclude`. If it is trained already, call `requires_grad_(False)` on it before.

        Args:
            exclude: selectors of modules to train fully; "deltas" stands for the delta itself and is always trained.

        Raises:
            SelectorError: if a selector is malformed or matches nothing.
            RoleError: if a role does not exist, or this backbone has no sure answer for it.
            StateError: if the delta is not attached, or a module cannot be trained fully.
        """
        entries = [exclude] if isinstance(exclude, str) else exclude
        freeze_backbone(self.delta, [name for name in entries if name != "deltas"] or None, _EXCLUDE)
        # A model class attaches without freezing. So the next one would train the whole backbone, and not save it.
        records_of(self.backbone_model)[0].grad_ledger.stay_frozen()

    def attach(self) -> None:
        """Attaches the delta again.

        Raises:
            StateError: if it is attached already, or its targets or names are taken by another delta.
        """
        self.delta.attach()

    def detach(self) -> None:
        """Removes the delta; the backbone is bit-exact as before.

        Raises:
            StateError: inside a `rows` block.
        """
        self.delta.detach()

    def save_finetuned(self, finetuned_delta_path: str | PathLike[str] = "./delta_checkpoints/") -> Path:
        """Saves the delta and returns the folder.

        Raises:
            StateError: if its scale is not 1, or this process does not hold all of its values (offloading, FSDP1, ZeRO-3).
        """
        return self.delta.save(finetuned_delta_path)

    def log(self) -> None:
        """Prints the tree, and the shares of trainable and of delta parameters."""
        print(show(self.backbone_model))
        deltas = {p for m in self.backbone_model.modules() if isinstance(m, DeltaModule) for p in m.parameters()}
        total = num_parameters(self.backbone_model) + sum(parameter.numel() for parameter in deltas)
        trained = sum(p.numel() for p in self.backbone_model.parameters() if p.requires_grad)
        print(
            f"trainable {share(trained, total)}, delta {share(self.delta.num_parameters, total)} of {total:,} parameters"
        )


def _default_targets(backbone: nn.Module, method: Method) -> tuple[str, ...] | None:
    """OpenDelta's default targets, if they are fewer than the method's: no cross-attention, and not all norms; else None."""
    planned = plan(backbone, replace(method, exclude=None))
    index, found = planned.index, planned.paths[method.name]
    cross, blocks, norms = (set(index.roles.paths(role)) for role in ("attn.cross", "block", "norm"))

    def is_default(path: str) -> bool:
        around = set(above(path))
        if path not in norms or around & blocks:
            return not around & cross
        # Outside of blocks, OpenDelta's tables have the final norms of GPT-2 and T5, and not those of BERT and OPT.
        return name_of(path) == "ln_f" or type(index.by_path[path]).__name__ == "T5LayerNorm"

    kept = [path for path in found if is_default(path)]
    return fold(kept) if len(kept) < len(found) else None


@checked
class LoraModel(DeltaModel):
    """LoRA with OpenDelta's options, attached at once. Raises what `attach` raises."""

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


@checked
class AdapterModel(DeltaModel):
    """Adapters with OpenDelta's options, attached at once. Raises what `attach` raises."""

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


@checked
class BitFitModel(DeltaModel):
    """BitFit with OpenDelta's options, attached at once. Raises what `attach` raises."""

    delta_type = "bitfit"

    def __init__(
        self, backbone_model: nn.Module, *, modified_modules: Selectors = None, exclude_modules: Selectors = None
    ) -> None:
        super().__init__(self._attached(backbone_model, BitFit(at=modified_modules, exclude=exclude_modules)))


@checked
class PrefixModel(DeltaModel):
    """Prefix tuning with OpenDelta's options, attached at once. Raises what `attach` raises."""

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


@checked
class SoftPromptModel(DeltaModel):
    """A soft prompt with OpenDelta's options, attached at once. Raises what `attach` raises."""

    delta_type = "soft_prompt"

    def __init__(self, backbone_model: nn.Module, *, soft_token_num: int = 100, token_init: bool = True) -> None:
        method = SoftPrompt(tokens=soft_token_num, init="vocab" if token_init else "random")
        super().__init__(self._attached(backbone_model, method))


_MODELS = {kind.delta_type: kind for kind in (LoraModel, AdapterModel, BitFitModel, PrefixModel, SoftPromptModel)}


def _kind(delta_type: object) -> Any:
    for name, kind in _MODELS.items():
        if delta_type == name:
            return kind
    raise OptionError(f"AutoDeltaConfig: unknown delta_type {delta_type!r}; use one of {', '.join(_MODELS)}")


@checked
@dataclass
class AutoDeltaConfig:
    """The type of a delta and its options, with OpenDelta's names."""

    delta_type: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _kind(self.delta_type)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> "AutoDeltaConfig":
        """Returns the config for a dictionary such as `{"delta_type": "lora", "lora_r": 8}`.

        Raises:
            OptionError: if the type is missing or unknown.
        """
        return cls(
            _kind(config_dict.get("delta_type")).delta_type,
            {key: value for key, value in config_dict.items() if key != "delta_type"},
        )


@checked
class AutoDeltaModel:
    """Makes deltas from a config or from saved files."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OptionError("AutoDeltaModel has no instances: call AutoDeltaModel.from_config or from_finetuned")

    @staticmethod
    def from_config(config: AutoDeltaConfig, *, backbone_model: nn.Module) -> DeltaModel:
        """Attaches the delta that a config describes and returns it.

        Raises:
            OptionError: if the type has no such option, or a value is out of its range.
            SelectorError: if a selector is malformed or matches nothing.
            RoleError: if a default position is not found on this backbone.
            TargetError: if the method cannot be attached to a selected module.
            StateError: if the targets are taken by another delta.
        """
        return _kind(config.delta_type)(backbone_model, **config.options)

    @staticmethod
    def from_finetuned(
        finetuned_model_name_or_path: str | PathLike[str],
        *,
        backbone_model: nn.Module,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> DeltaModel:
        """Loads a delta from a folder or a Hub repository, attaches it and returns it.

        Args:
            token: an access token for the Hub.
            revision: a branch, tag or commit of the repository.

        Raises:
            CheckpointError: if the folder is missing, is no delta, is damaged, or does not fit the backbone.
            BackboneMismatch: if the delta was trained on another backbone.
            HubError: if the repository cannot be read.
            StateError: if the targets are taken by another delta.
        """
        delta = load(finetuned_model_name_or_path, backbone_model, token=token, revision=revision, freeze=False)
        kind = _MODELS.get(delta.methods[0].name, DeltaModel) if len(delta.methods) == 1 else DeltaModel
        model = kind.__new__(kind)
        DeltaModel.__init__(model, delta)
        return model
