"""Compacter with OpenDelta's names."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from deltakit.core import Method, checked
from deltakit.errors import OptionError, warn
from deltakit.methods.compacter import Compacter
from deltakit.methods.compacter import CompacterDelta as HyperComplexAdapterLayer
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_models.bottleneck import BottleneckConfig
from deltakit.opendelta.matching import Selectors

__all__ = ["CompacterConfig", "CompacterModel", "HyperComplexAdapterLayer"]

# What deltakit's Compacter has one value for.
_FIXED: Mapping[str, Any] = {
    "learn_phm": True,
    "factorized_phm": True,
    "shared_W_phm": False,
    "factorized_phm_rule": False,
    "kronecker_prod": None,
}
_START: Mapping[str, Any] = {
    "phm_c_init": "normal",
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_init_range": 0.0001,
}


class CompacterConfig(BottleneckConfig):
    """The options of `CompacterModel`."""

    delta_type = "compacter"
    method = Compacter
    renamed = {  # noqa: RUF012  # as declared
        "reduction_factor": "reduction",
        "hypercomplex_division": "division",
        "phm_rank": "r",
        "shared_phm_rule": "shared_rule",
    }

    def __init__(
        self,
        reduction_factor: int = 16,
        non_linearity: str = "gelu_new",
        phm_c_init: str = "normal",
        hypercomplex_division: int = 4,
        learn_phm: bool = True,
        hypercomplex_nonlinearity: str = "glorot-uniform",
        shared_phm_rule: bool = False,
        factorized_phm: bool = True,
        shared_W_phm: bool = False,  # noqa: N803  # OpenDelta's name
        factorized_phm_rule: bool = False,
        phm_rank: int = 1,
        phm_init_range: float = 0.0001,
        kronecker_prod: bool | None = None,
        use_bias_up_sampler: bool = True,
        use_bias_down_sampler: bool = True,
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        super().__init__(**kwargs)
        self.__dict__.update(own)

    def method_at(self, at: Any, **options: Any) -> Method:
        """Returns deltakit's method with these options and targets. Start values are deltakit's, else a warning.

        Raises:
            OptionError: if an option is out of its range, or has a value that deltakit's Compacter does not have.
        """
        own = vars(self)
        for name, only in _FIXED.items():
            if own[name] != only:
                raise OptionError(f"CompacterModel({name}={own[name]!r}): only {only!r} is served; omit it")
        if own["use_bias_up_sampler"] != own["use_bias_down_sampler"]:
            raise OptionError(
                "CompacterModel: use_bias_up_sampler and use_bias_down_sampler differ; give both one value"
            )
        changed = [name for name, usual in _START.items() if own[name] != usual]
        if changed:
            warn(f"CompacterModel: {', '.join(changed)} have no effect; the start values are deltakit's")
        return super().method_at(at, bias=own["use_bias_up_sampler"], **options)

    @classmethod
    def options_of(cls, method: Mapping[str, Any]) -> dict[str, Any]:
        """Returns OpenDelta's options for a method as deltakit's files have it."""
        bias = method.get("bias", True)
        return {**super().options_of(method), "use_bias_up_sampler": bias, "use_bias_down_sampler": bias}


@checked
class CompacterModel(DeltaBase):
    """Compacter with OpenDelta's options, attached at once. Raises what `attach` raises."""

    delta_type = "compacter"
    config_class = CompacterConfig
    default_modified_modules = ("attn@.proj@", "ff@.w2@")

    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
        backend: str = "hf",
        reduction_factor: int = 16,
        non_linearity: str = "gelu_new",
        phm_c_init: str = "normal",
        hypercomplex_division: int = 4,
        learn_phm: bool = True,
        hypercomplex_nonlinearity: str = "glorot-uniform",
        shared_phm_rule: bool = False,
        factorized_phm: bool = True,
        shared_W_phm: bool = False,  # noqa: N803  # OpenDelta's name
        factorized_phm_rule: bool = False,
        phm_rank: int = 1,
        phm_init_range: float = 0.0001,
        kronecker_prod: bool | None = None,
        use_bias_up_sampler: bool = True,
        use_bias_down_sampler: bool = True,
    ) -> None:
        self._attach_with(locals())
