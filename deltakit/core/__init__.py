"""The types and words that all rooms share.

Method, Target and DeltaModule; the record of a delta and the mixed batch that it may take part in; paths, folded names,
and what a linear layer is. Imports nothing but `errors`.
"""

from deltakit.core.activations import hidden_input, hidden_output, replace_hidden, replace_input
from deltakit.core.arguments import checked
from deltakit.core.attached_module import FROZEN, TRAINING, FirstSizes
from deltakit.core.backbone_call import (
    INSERTED,
    CurrentCall,
    begin_call,
    current_call,
    drop_interrupted_calls,
    end_call,
    note_inserted,
)
from deltakit.core.bare_weight import (
    BareLayer,
    WeightView,
    bare_weight,
    bias_of,
    dequantized,
    embedding_rows,
    is_quantized,
    weight_entries,
    weight_view,
)
from deltakit.core.buffer_ledger import buffer_at, copy_buffers, is_below, relative
from deltakit.core.cached_text import keep_text, whole_text
from deltakit.core.callables import takes
from deltakit.core.caller_rows import begin_forward, close_rows, current_batch, end_forward, open_rows
from deltakit.core.collections_paused import collections_paused
from deltakit.core.copied_modules import COMPUTED, shallow_copy
from deltakit.core.delta_module import DeltaModule
from deltakit.core.design import Design
from deltakit.core.extras import StoredExtra, extra_tensors, is_extra, stored_extras
from deltakit.core.feature_slice import FeatureSlice, slice_where
from deltakit.core.folding import breadth, expand, fold, is_plain, span
from deltakit.core.grad_ledger import GradLedger
from deltakit.core.held import add_held, held_in, remove_held
from deltakit.core.linear import is_compute_dtype, is_conv1d, is_exactly_conv1d, linear_sizes, projection_sizes, wide
from deltakit.core.logical import (
    LogicalParameter,
    logical_parameters,
    named_logical_parameters,
    num_parameters,
)
from deltakit.core.method import METHODS, BackboneView, Method, Selector
from deltakit.core.method_registry import label_among
from deltakit.core.mixed_batch import MixedBatch
from deltakit.core.normal_tensors import normal_tensors, version_of
from deltakit.core.outline import notebook_bundle
from deltakit.core.package_alias import alias_package
from deltakit.core.parts import are_apart, is_slice, word_of
from deltakit.core.paths import (
    above,
    children_of,
    delta_children,
    forget_notes,
    held_at,
    is_callable,
    is_of,
    join,
    module_at,
    name_of,
    names_by_id,
    one_walk,
    own_children,
    own_modules,
    own_parameters,
    parent_of,
    split_slice,
    tensors_in,
    tensors_of,
    type_names,
    unwrapped,
    wrapped_layer,
)
from deltakit.core.per_target import PerTarget, one_value, values_of
from deltakit.core.record import (
    Attachment,
    Record,
    Site,
    attachments_of,
    keyed,
    label_of,
    note_record,
    parameters_of,
    records_at,
    records_in,
    records_of,
    shapes_of,
)
from deltakit.core.replicas import complete_replica
from deltakit.core.roots import RootHook, rooted_at, roots_inside
from deltakit.core.running_call import RunningCall, running_call
from deltakit.core.running_statistics import moved_in, notice_moved_buffers
from deltakit.core.sharding import (
    class_name,
    gathered,
    gathered_in_training,
    is_first,
    is_sharded,
    scatter,
    wait_for_all,
)
from deltakit.core.start_samples import Sample, Start
from deltakit.core.start_values import same_random_numbers, wants_start_values, without_start_values
from deltakit.core.stored import global_bytes, inner_tensors, local_bytes
from deltakit.core.target import Inferred, Target, WeightRead
from deltakit.core.target_hooks import NO_OUTPUT, InputHook, OutputHook, is_traced
from deltakit.core.trial_call import Inputs, trial_call
from deltakit.core.without_deltas import deltas_left_out, without_deltas

__all__ = [
    "COMPUTED",
    "FROZEN",
    "INSERTED",
    "METHODS",
    "NO_OUTPUT",
    "TRAINING",
    "Attachment",
    "BackboneView",
    "BareLayer",
    "CurrentCall",
    "DeltaModule",
    "Design",
    "FeatureSlice",
    "FirstSizes",
    "GradLedger",
    "Inferred",
    "InputHook",
    "Inputs",
    "LogicalParameter",
    "Method",
    "MixedBatch",
    "OutputHook",
    "PerTarget",
    "Record",
    "RootHook",
    "RunningCall",
    "Sample",
    "Selector",
    "Site",
    "Start",
    "StoredExtra",
    "Target",
    "WeightRead",
    "WeightView",
    "above",
    "add_held",
    "alias_package",
    "are_apart",
    "attachments_of",
    "bare_weight",
    "begin_call",
    "begin_forward",
    "bias_of",
    "breadth",
    "buffer_at",
    "checked",
    "children_of",
    "class_name",
    "close_rows",
    "collections_paused",
    "complete_replica",
    "copy_buffers",
    "current_batch",
    "current_call",
    "delta_children",
    "deltas_left_out",
    "dequantized",
    "drop_interrupted_calls",
    "embedding_rows",
    "end_call",
    "end_forward",
    "expand",
    "extra_tensors",
    "fold",
    "forget_notes",
    "gathered",
    "gathered_in_training",
    "global_bytes",
    "held_at",
    "held_in",
    "hidden_input",
    "hidden_output",
    "inner_tensors",
    "is_below",
    "is_callable",
    "is_compute_dtype",
    "is_conv1d",
    "is_exactly_conv1d",
    "is_extra",
    "is_first",
    "is_of",
    "is_plain",
    "is_quantized",
    "is_sharded",
    "is_slice",
    "is_traced",
    "join",
    "keep_text",
    "keyed",
    "label_among",
    "label_of",
    "linear_sizes",
    "local_bytes",
    "logical_parameters",
    "module_at",
    "moved_in",
    "name_of",
    "named_logical_parameters",
    "names_by_id",
    "normal_tensors",
    "note_inserted",
    "note_record",
    "notebook_bundle",
    "notice_moved_buffers",
    "num_parameters",
    "one_value",
    "one_walk",
    "open_rows",
    "own_children",
    "own_modules",
    "own_parameters",
    "parameters_of",
    "parent_of",
    "projection_sizes",
    "records_at",
    "records_in",
    "records_of",
    "relative",
    "remove_held",
    "replace_hidden",
    "replace_input",
    "rooted_at",
    "roots_inside",
    "running_call",
    "same_random_numbers",
    "scatter",
    "shallow_copy",
    "shapes_of",
    "slice_where",
    "span",
    "split_slice",
    "stored_extras",
    "takes",
    "tensors_in",
    "tensors_of",
    "trial_call",
    "type_names",
    "unwrapped",
    "values_of",
    "version_of",
    "wait_for_all",
    "wants_start_values",
    "weight_entries",
    "weight_view",
    "whole_text",
    "wide",
    "without_deltas",
    "without_start_values",
    "word_of",
    "wrapped_layer",
]
