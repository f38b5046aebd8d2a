"""The only room that registers hooks.

Output hooks on targets, weight patches for weights that are read directly, the check of the first forward, and the guards
that stand on a backbone while it holds deltas.
"""

from deltakit.injection.backbone_guards import change_begins, watch, watch_rows
from deltakit.injection.first_forward import forget_first_forward, watch_first_forward
from deltakit.injection.hooks import put, scopes_of, sort_patches, take, take_patches
from deltakit.injection.loading_guards import hook_loading, records_around
from deltakit.injection.narrowed_state_dict import is_narrowed, narrow_state_dict, whole_state_dict, widen_state_dict
from deltakit.injection.replaced_targets import holder_of, modules_of
from deltakit.injection.saving_hooks import bare_state_dicts

__all__ = [
    "bare_state_dicts",
    "change_begins",
    "forget_first_forward",
    "holder_of",
    "hook_loading",
    "is_narrowed",
    "modules_of",
    "narrow_state_dict",
    "put",
    "records_around",
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
