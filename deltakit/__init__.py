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

from deltakit import integrations as integrations
from deltakit import methods as methods
from deltakit import prompting as prompting
from deltakit.core import METHODS, DeltaModule, Method, Target
from deltakit.delta import (
    Combination,
    Delta,
    Plan,
    SavedDelta,
    SavedMethod,
    attach,
    attach_from_data,
    base_state_dict,
    combine,
    deltas,
    inspect,
    load,
    merged_state_dict,
    plan,
    rows,
    use,
)
from deltakit.errors import (
    BackboneMismatch,
    CheckpointError,
    DeltaError,
    DeltaWarning,
    HubError,
    OptionError,
    RoleError,
    SelectorError,
    StateError,
    TargetError,
)
from deltakit.measuring import account, diff, targets
from deltakit.methods.adalora import AdaLoRA
from deltakit.methods.adapter import Adapter
from deltakit.methods.adapter_fusion import AdapterFusion
from deltakit.methods.average import Average
from deltakit.methods.bitfit import BitFit
from deltakit.methods.boft import BOFT
from deltakit.methods.c3a import C3A
from deltakit.methods.compacter import Compacter
from deltakit.methods.delora import DeLoRA
from deltakit.methods.fourierft import FourierFT
from deltakit.methods.glora import GLoRA
from deltakit.methods.gralora import GraLoRA
from deltakit.methods.hira import HiRA
from deltakit.methods.hra import HRA
from deltakit.methods.ia3 import IA3
from deltakit.methods.intrinsic_prompt import IntrinsicPrompt, PromptDecoder
from deltakit.methods.invertible_adapter import InvertibleAdapter
from deltakit.methods.llama_adapter import LlamaAdapter
from deltakit.methods.ln_tuning import LNTuning
from deltakit.methods.loha import LoHa
from deltakit.methods.lokr import LoKr
from deltakit.methods.lora import LoRA
from deltakit.methods.low_rank_adapter import LowRankAdapter
from deltakit.methods.lst import LST
from deltakit.methods.miss import MiSS
from deltakit.methods.multitask_prompt import MultitaskPrompt
from deltakit.methods.oft import OFT
from deltakit.methods.p_tuning import PTuning
from deltakit.methods.parallel_adapter import ParallelAdapter
from deltakit.methods.prefix import Prefix, PTuningV2
from deltakit.methods.randlora import RandLoRA
from deltakit.methods.reft import ReFT
from deltakit.methods.road import RoAd
from deltakit.methods.said import SAID
from deltakit.methods.shira import SHiRA
from deltakit.methods.soft_prompt import SoftPrompt
from deltakit.methods.trainable_tokens import TrainableTokens
from deltakit.methods.vblora import VBLoRA
from deltakit.methods.vera import VeRA
from deltakit.methods.waveft import WaveFT
from deltakit.opendelta import (
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    BitFitModel,
    CompacterModel,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
    PrefixModel,
    SoftPromptModel,
    Visualization,
)
from deltakit.ops import CallContext, InputMap, LowRank, OutputMap, Weighing, WeightMap
from deltakit.searching import Structure, search
from deltakit.selection import RoleTable, roles, select
from deltakit.version import __version__
from deltakit.view import View, show

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "LST",
    "METHODS",
    "OFT",
    "SAID",
    "AdaLoRA",
    "Adapter",
    "AdapterFusion",
    "AdapterModel",
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "Average",
    "BackboneMismatch",
    "BitFit",
    "BitFitModel",
    "CallContext",
    "CheckpointError",
    "Combination",
    "Compacter",
    "CompacterModel",
    "DeLoRA",
    "Delta",
    "DeltaError",
    "DeltaModule",
    "DeltaWarning",
    "FourierFT",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "HubError",
    "InputMap",
    "IntrinsicPrompt",
    "InvertibleAdapter",
    "LNTuning",
    "LlamaAdapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoraModel",
    "LowRank",
    "LowRankAdapter",
    "LowRankAdapterModel",
    "Method",
    "MiSS",
    "MultitaskPrompt",
    "OptionError",
    "OutputMap",
    "PTuning",
    "PTuningV2",
    "ParallelAdapter",
    "ParallelAdapterModel",
    "Plan",
    "Prefix",
    "PrefixModel",
    "PromptDecoder",
    "RandLoRA",
    "ReFT",
    "RoAd",
    "RoleError",
    "RoleTable",
    "SHiRA",
    "SavedDelta",
    "SavedMethod",
    "SelectorError",
    "SoftPrompt",
    "SoftPromptModel",
    "StateError",
    "Structure",
    "Target",
    "TargetError",
    "TrainableTokens",
    "VBLoRA",
    "VeRA",
    "View",
    "Visualization",
    "WaveFT",
    "Weighing",
    "WeightMap",
    "__version__",
    "account",
    "attach",
    "attach_from_data",
    "base_state_dict",
    "combine",
    "deltas",
    "diff",
    "inspect",
    "load",
    "merged_state_dict",
    "plan",
    "roles",
    "rows",
    "search",
    "select",
    "show",
    "targets",
    "use",
]


def __dir__() -> list[str]:
    """What `dk.<Tab>` lists: the public names, and none of the rooms of the package but these three."""
    return sorted([*__all__, "integrations", "opendelta", "prompting"])
