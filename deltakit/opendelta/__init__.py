"""OpenDelta's API: code written for OpenDelta runs after importing from `deltakit.opendelta` instead of `opendelta`.

It has OpenDelta's module names, and its defaults: models attach at once, and nothing is frozen until `freeze_module` is
called. Where OpenDelta says nothing of a name that matches nothing or an option without effect, a warning does. `install()`
serves `import opendelta` itself.
"""

from collections.abc import Sequence

from deltakit.core import alias_package
from deltakit.errors import OptionError
from deltakit.opendelta.auto_delta import AutoDeltaConfig, AutoDeltaModel
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
from deltakit.opendelta.loading import SaveLoadMixin
from deltakit.opendelta.utils import logging
from deltakit.opendelta.utils.structure_mapping import CommonStructureMap
from deltakit.opendelta.utils.visualization import Visualization

__all__ = [
    "AdapterModel",
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "BaseDeltaConfig",
    "BitFitModel",
    "CommonStructureMap",
    "CompacterModel",
    "DeltaBase",
    "LoraModel",
    "LowRankAdapterModel",
    "ParallelAdapterModel",
    "PrefixModel",
    "SaveLoadMixin",
    "SoftPromptModel",
    "Visualization",
    "install",
    "logging",
    "set_axis_order",
]

__version__ = "0.3.0"
"""The version of OpenDelta whose API this is."""


def set_axis_order(axis_order: Sequence[int] = (0, 1, 2)) -> None:
    """Accepts OpenDelta's default order of axes: batch, length, features.

    Raises:
        OptionError: if it is another order.
    """
    if tuple(axis_order) != (0, 1, 2):
        raise OptionError(f"set_axis_order({list(axis_order)}): only [0, 1, 2] is served: batch, length, features")


def install() -> None:
    """Makes `import opendelta` and `from opendelta.auto_delta import ...` import this package. Call it before such imports.

    Raises:
        StateError: if OpenDelta itself is imported already.
    """
    alias_package(__name__, "opendelta")
