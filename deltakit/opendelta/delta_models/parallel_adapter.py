"""Parallel adapters with OpenDelta's names."""

from typing import Any

from torch import nn

from deltakit.core import Method, checked
from deltakit.errors import OptionError
from deltakit.methods.parallel_adapter import ParallelAdapter
from deltakit.methods.parallel_adapter import ParallelAdapterDelta as ParallelAdapterLayer
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_models.adapter import AdapterConfig
from deltakit.opendelta.matching import Selectors

__all__ = ["ParallelAdapterConfig", "ParallelAdapterLayer", "ParallelAdapterModel"]


class ParallelAdapterConfig(AdapterConfig):
    """The options of `ParallelAdapterModel`: those of `AdapterModel`."""

    delta_type = "parallel_adapter"
    method = ParallelAdapter

    def method_at(self, at: Any, **options: Any) -> Method:
        """Returns deltakit's method with these options and targets. As in OpenDelta, the result is added as it is."""
        return super().method_at(at, scaling=1.0, **options)


@checked
class ParallelAdapterModel(DeltaBase):
    """Parallel adapters with OpenDelta's options, attached at once. Raises what `attach` raises.

    The names in `modified_modules` are pairs: an adapter reads the input of the first and adds to the output of the second,
    which may be the same module.
    """

    delta_type = "parallel_adapter"
    config_class = ParallelAdapterConfig
    default_modified_modules = ("attn@", "attn@", "ff@.w1@", "ff@.w2@")
    times_named = 2

    def __init__(
        self,
        backbone_model: nn.Module,
        bottleneck_dim: int = 24,
        non_linearity: str = "gelu_new",
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
        backend: str = "hf",
    ) -> None:
        self._attach_with(locals())

    def _methods(self) -> list[Method]:
        names = self.modified_modules
        if len(names) % 2:
            raise OptionError(
                f"ParallelAdapterModel(modified_modules={names}): expected pairs of names, found {len(names)}; name the "
                "module whose input is read, and then the one whose output is changed, which may be the same"
            )
        found = self._found()
        if not isinstance(found, dict):
            return [self.config.method_at(found)]
        pairs = zip(names[::2], names[1::2], strict=True)
        # A method for each pair: of several modules, each target reads the nearest.
        return [
            self.config.method_at(tuple(found[last]), source=tuple(found[first]))
            for first, last in pairs
            if found[first] and found[last]
        ]
