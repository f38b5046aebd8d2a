"""The only room that registers hooks.

Output hooks on targets, weight patches for weights that are read directly, the check of the first forward, and the guards
that stand on a backbone while it holds deltas.
"""

from deltakit.injection.backbone_guards import change_begins, watch, watch_rows
from deltakit.injection.captured_outputs import captured_output
from deltakit.injection.first_forward import forget_first_forward, watch_first_forward
from deltakit.injection.forward_recorder import Recorded, recorded_calls
from deltakit.injection.hooks import put, scopes_of, sort_patches, take, take_patches
from deltakit.injection.input_observer import observed_inputs
from deltakit.injection.loading_guards import hook_loading, records_around
from deltakit.injection.narrowed_inputs import narrowed_input
from deltakit.injection.narrowed_state_dict import (
    is_narrowed,
    is_whole_state_dict,
    narrow_state_dict,
    whole_state_dict,
    widen_state_dict,
)
from deltakit.injection.replaced_targets import holder_of, modules_of
from deltakit.injection.saving_call import SavingCall, in_method_of, is_checkpoint, saving_call
from deltakit.injection.saving_hooks import hook_state_dicts, own_state_dicts

__all__ = [
    "Recorded",
    "SavingCall",
    "captured_output",
    "change_begins",
    "forget_first_forward",
    "holder_of",
    "hook_loading",
    "hook_state_dicts",
    "in_method_of",
    "is_checkpoint",
    "is_narrowed",
    "is_whole_state_dict",
    "modules_of",
    "narrow_state_dict",
    "narrowed_input",
    "observed_inputs",
    "own_state_dicts",
    "put",
    "recorded_calls",
    "records_around",
    "saving_call",
    "scopes_of",
    "sort_patches",
    "take",
    "take_patches",
    "watch",
    "watch_first_forward",
    "watch_rows",
    "whole_state_dict",
    "widen_state_dict",
]
