"""The handle of a delta and its verbs: attach, load, plan, merge, combine, swap, and mixed batches."""

from deltakit.delta.attaching import attach
from deltakit.delta.beside import attach_beside, spare_name
from deltakit.delta.combining import Combination, combine
from deltakit.delta.converting import convert
from deltakit.delta.freezing import freeze_parameters, keep_frozen, narrow, widen
from deltakit.delta.from_data import attach_from_data
from deltakit.delta.handle import Delta
from deltakit.delta.inspecting import SavedDelta, SavedMethod, inspect
from deltakit.delta.loading import OTHER_BACKBONE, load
from deltakit.delta.method_rows import method_rows
from deltakit.delta.mixed_rows import rows
from deltakit.delta.new_heads import Spelling
from deltakit.delta.own_values import base_state_dict, merged_state_dict
from deltakit.delta.planning import Plan, plan
from deltakit.delta.save_job import SaveJob
from deltakit.delta.training_state import checkpoint_tensors, trains_only_deltas
from deltakit.delta.using import deltas, use
from deltakit.delta.whole_checkpoints import deltas_in_file, whole_checkpoint_mark

__all__ = [
    "OTHER_BACKBONE",
    "Combination",
    "Delta",
    "Plan",
    "SaveJob",
    "SavedDelta",
    "SavedMethod",
    "Spelling",
    "attach",
    "attach_beside",
    "attach_from_data",
    "base_state_dict",
    "checkpoint_tensors",
    "combine",
    "convert",
    "deltas",
    "deltas_in_file",
    "freeze_parameters",
    "inspect",
    "keep_frozen",
    "load",
    "merged_state_dict",
    "method_rows",
    "narrow",
    "plan",
    "rows",
    "spare_name",
    "trains_only_deltas",
    "use",
    "whole_checkpoint_mark",
    "widen",
]
