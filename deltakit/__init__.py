"""Attaches deltas (LoRA, adapters, prompts and others) to a frozen PyTorch model by hooks, and saves, loads and removes them.

>>> import torch, deltakit as dk
>>> model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
>>> delta = dk.attach(model, dk.LoRA(r=2, at="0"))
>>> delta
delta 'delta' on Sequential: attached, active, trainable
  lora r=2 alpha=16                    1 target  +24
      0
24 parameters, 36.4 % of the backbone's 66
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from deltakit.version import __version__ as __version__

# What `dk.LoRA` and others are for type checkers and editors. At run time a name is imported when it is used first, because
# torch takes 2 s: `deltakit --help` and `import deltakit` need none of it. `tests/test_public_names.py` writes the lines of
# methods, and the table below.
if TYPE_CHECKING:
    from deltakit import integrations as integrations
    from deltakit import methods as methods
    from deltakit import prompting as prompting
    from deltakit.core import METHODS as METHODS
    from deltakit.core import DeltaModule as DeltaModule
    from deltakit.core import Method as Method
    from deltakit.core import Target as Target
    from deltakit.delta import Combination as Combination
    from deltakit.delta import Delta as Delta
    from deltakit.delta import Plan as Plan
    from deltakit.delta import SavedDelta as SavedDelta
    from deltakit.delta import SavedMethod as SavedMethod
    from deltakit.delta import attach as attach
    from deltakit.delta import attach_from_data as attach_from_data
    from deltakit.delta import base_state_dict as base_state_dict
    from deltakit.delta import combine as combine
    from deltakit.delta import deltas as deltas
    from deltakit.delta import inspect as inspect
    from deltakit.delta import load as load
    from deltakit.delta import merged_state_dict as merged_state_dict
    from deltakit.delta import plan as plan
    from deltakit.delta import rows as rows
    from deltakit.delta import use as use
    from deltakit.errors import BackboneMismatch as BackboneMismatch
    from deltakit.errors import CheckpointError as CheckpointError
    from deltakit.errors import DeltaError as DeltaError
    from deltakit.errors import DeltaWarning as DeltaWarning
    from deltakit.errors import HubError as HubError
    from deltakit.errors import OptionError as OptionError
    from deltakit.errors import RoleError as RoleError
    from deltakit.errors import SelectorError as SelectorError
    from deltakit.errors import StateError as StateError
    from deltakit.errors import TargetError as TargetError
    from deltakit.measuring import account as account
    from deltakit.measuring import diff as diff
    from deltakit.measuring import targets as targets
    from deltakit.methods.adalora import AdaLoRA as AdaLoRA
    from deltakit.methods.adapter import Adapter as Adapter
    from deltakit.methods.adapter_fusion import AdapterFusion as AdapterFusion
    from deltakit.methods.average import Average as Average
    from deltakit.methods.bitfit import BitFit as BitFit
    from deltakit.methods.boft import BOFT as BOFT
    from deltakit.methods.c3a import C3A as C3A
    from deltakit.methods.compacter import Compacter as Compacter
    from deltakit.methods.delora import DeLoRA as DeLoRA
    from deltakit.methods.fourierft import FourierFT as FourierFT
    from deltakit.methods.glora import GLoRA as GLoRA
    from deltakit.methods.gralora import GraLoRA as GraLoRA
    from deltakit.methods.hira import HiRA as HiRA
    from deltakit.methods.hra import HRA as HRA
    from deltakit.methods.ia3 import IA3 as IA3
    from deltakit.methods.intrinsic_prompt import IntrinsicPrompt as IntrinsicPrompt
    from deltakit.methods.intrinsic_prompt import PromptDecoder as PromptDecoder
    from deltakit.methods.invertible_adapter import InvertibleAdapter as InvertibleAdapter
    from deltakit.methods.llama_adapter import LlamaAdapter as LlamaAdapter
    from deltakit.methods.ln_tuning import LNTuning as LNTuning
    from deltakit.methods.loha import LoHa as LoHa
    from deltakit.methods.lokr import LoKr as LoKr
    from deltakit.methods.lora import LoRA as LoRA
    from deltakit.methods.low_rank_adapter import LowRankAdapter as LowRankAdapter
    from deltakit.methods.lst import LST as LST
    from deltakit.methods.miss import MiSS as MiSS
    from deltakit.methods.multitask_prompt import MultitaskPrompt as MultitaskPrompt
    from deltakit.methods.oft import OFT as OFT
    from deltakit.methods.p_tuning import PTuning as PTuning
    from deltakit.methods.parallel_adapter import ParallelAdapter as ParallelAdapter
    from deltakit.methods.prefix import Prefix as Prefix
    from deltakit.methods.prefix import PTuningV2 as PTuningV2
    from deltakit.methods.randlora import RandLoRA as RandLoRA
    from deltakit.methods.reft import ReFT as ReFT
    from deltakit.methods.road import RoAd as RoAd
    from deltakit.methods.said import SAID as SAID
    from deltakit.methods.shira import SHiRA as SHiRA
    from deltakit.methods.soft_prompt import SoftPrompt as SoftPrompt
    from deltakit.methods.trainable_tokens import TrainableTokens as TrainableTokens
    from deltakit.methods.vblora import VBLoRA as VBLoRA
    from deltakit.methods.vera import VeRA as VeRA
    from deltakit.methods.waveft import WaveFT as WaveFT
    from deltakit.opendelta import AdapterModel as AdapterModel
    from deltakit.opendelta import AutoDeltaConfig as AutoDeltaConfig
    from deltakit.opendelta import AutoDeltaModel as AutoDeltaModel
    from deltakit.opendelta import BitFitModel as BitFitModel
    from deltakit.opendelta import CompacterModel as CompacterModel
    from deltakit.opendelta import LoraModel as LoraModel
    from deltakit.opendelta import LowRankAdapterModel as LowRankAdapterModel
    from deltakit.opendelta import ParallelAdapterModel as ParallelAdapterModel
    from deltakit.opendelta import PrefixModel as PrefixModel
    from deltakit.opendelta import SoftPromptModel as SoftPromptModel
    from deltakit.opendelta import Visualization as Visualization
    from deltakit.ops import CallContext as CallContext
    from deltakit.ops import InputMap as InputMap
    from deltakit.ops import LowRank as LowRank
    from deltakit.ops import OutputMap as OutputMap
    from deltakit.ops import Weighing as Weighing
    from deltakit.ops import WeightMap as WeightMap
    from deltakit.picking import Selection as Selection
    from deltakit.picking import pick as pick
    from deltakit.searching import Structure as Structure
    from deltakit.searching import search as search
    from deltakit.selection import RoleTable as RoleTable
    from deltakit.selection import roles as roles
    from deltakit.selection import select as select
    from deltakit.view import View as View
    from deltakit.view import show as show

_MODULE_OF = {
    "AdaLoRA": "methods.adalora",
    "Adapter": "methods.adapter",
    "AdapterFusion": "methods.adapter_fusion",
    "AdapterModel": "opendelta",
    "AutoDeltaConfig": "opendelta",
    "AutoDeltaModel": "opendelta",
    "Average": "methods.average",
    "BOFT": "methods.boft",
    "BackboneMismatch": "errors",
    "BitFit": "methods.bitfit",
    "BitFitModel": "opendelta",
    "C3A": "methods.c3a",
    "CallContext": "ops",
    "CheckpointError": "errors",
    "Combination": "delta",
    "Compacter": "methods.compacter",
    "CompacterModel": "opendelta",
    "DeLoRA": "methods.delora",
    "Delta": "delta",
    "DeltaError": "errors",
    "DeltaModule": "core",
    "DeltaWarning": "errors",
    "FourierFT": "methods.fourierft",
    "GLoRA": "methods.glora",
    "GraLoRA": "methods.gralora",
    "HRA": "methods.hra",
    "HiRA": "methods.hira",
    "HubError": "errors",
    "IA3": "methods.ia3",
    "InputMap": "ops",
    "IntrinsicPrompt": "methods.intrinsic_prompt",
    "InvertibleAdapter": "methods.invertible_adapter",
    "LNTuning": "methods.ln_tuning",
    "LST": "methods.lst",
    "LlamaAdapter": "methods.llama_adapter",
    "LoHa": "methods.loha",
    "LoKr": "methods.lokr",
    "LoRA": "methods.lora",
    "LoraModel": "opendelta",
    "LowRank": "ops",
    "LowRankAdapter": "methods.low_rank_adapter",
    "LowRankAdapterModel": "opendelta",
    "METHODS": "core",
    "Method": "core",
    "MiSS": "methods.miss",
    "MultitaskPrompt": "methods.multitask_prompt",
    "OFT": "methods.oft",
    "OptionError": "errors",
    "OutputMap": "ops",
    "PTuning": "methods.p_tuning",
    "PTuningV2": "methods.prefix",
    "ParallelAdapter": "methods.parallel_adapter",
    "ParallelAdapterModel": "opendelta",
    "Plan": "delta",
    "Prefix": "methods.prefix",
    "PrefixModel": "opendelta",
    "PromptDecoder": "methods.intrinsic_prompt",
    "RandLoRA": "methods.randlora",
    "ReFT": "methods.reft",
    "RoAd": "methods.road",
    "RoleError": "errors",
    "RoleTable": "selection",
    "SAID": "methods.said",
    "SHiRA": "methods.shira",
    "SavedDelta": "delta",
    "SavedMethod": "delta",
    "Selection": "picking",
    "SelectorError": "errors",
    "SoftPrompt": "methods.soft_prompt",
    "SoftPromptModel": "opendelta",
    "StateError": "errors",
    "Structure": "searching",
    "Target": "core",
    "TargetError": "errors",
    "TrainableTokens": "methods.trainable_tokens",
    "VBLoRA": "methods.vblora",
    "VeRA": "methods.vera",
    "View": "view",
    "Visualization": "opendelta",
    "WaveFT": "methods.waveft",
    "Weighing": "ops",
    "WeightMap": "ops",
    "account": "measuring",
    "attach": "delta",
    "attach_from_data": "delta",
    "base_state_dict": "delta",
    "combine": "delta",
    "deltas": "delta",
    "diff": "measuring",
    "inspect": "delta",
    "load": "delta",
    "merged_state_dict": "delta",
    "pick": "picking",
    "plan": "delta",
    "roles": "selection",
    "rows": "delta",
    "search": "searching",
    "select": "selection",
    "show": "view",
    "targets": "measuring",
    "use": "delta",
}
"""The module of each public name."""

__all__ = sorted([*_MODULE_OF, "__version__"])


def __dir__() -> list[str]:
    """What `dk.<Tab>` lists: the public names, and none of the rooms of the package but these three."""
    return sorted([*__all__, "integrations", "opendelta", "prompting"])


# Hidden from type checkers: for them every name would be there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            found = getattr(import_module(f"deltakit.{_MODULE_OF[name]}"), name)
        elif not name.startswith("_") and find_spec(f"deltakit.{name}") is not None:
            found = import_module(f"deltakit.{name}")
        else:
            raise AttributeError(f"module 'deltakit' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        return globals().setdefault(name, found)
