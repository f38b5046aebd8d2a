"""The handle of a delta and its verbs: attach, load, plan, merge, combine, swap, and mixed batches."""

from deltakit.delta.attaching import attach
from deltakit.delta.beside import attach_beside, spare_name
from deltakit.delta.combining import Combination, combine
from deltakit.delta.converting import convert
from deltakit.delta.freezing import freeze_parameters, narrow, widen
from deltakit.delta.handle import Delta, deltas
from deltakit.delta.inspecting import SavedDelta, SavedMethod, inspect
from deltakit.delta.loading import load
from deltakit.delta.mixed_rows import rows
from deltakit.delta.new_heads import Spelling
from deltakit.delta.own_values import base_state_dict
from deltakit.delta.planning import Plan, plan
from deltakit.delta.using import use

__all__ = [
    "Combination",
    "Delta",
    "Plan",
    "SavedDelta",
    "SavedMethod",
    "Spelling",
    "attach",
    "attach_beside",
    "base_state_dict",
    "combine",
    "convert",
    "deltas",
    "freeze_parameters",
    "inspect",
    "load",
    "narrow",
    "plan",
    "rows",
    "spare_name",
    "use",
    "widen",
]
