"""The types and words that all rooms share.

Method, Target and DeltaModule; the record of a delta and the mixed batch that it may take part in; paths, folded names,
and what a linear layer is. Imports nothing but `errors`.
"""

from deltakit.core.activations import hidden_input, hidden_output
from deltakit.core.delta_module import DeltaModule, can_scale
from deltakit.core.feature_slice import Rows, rows_where
from deltakit.core.folding import expand, fold, span
from deltakit.core.grad_ledger import Ledger
from deltakit.core.linear import is_compute_dtype, is_conv1d, linear_sizes, projection_sizes, wide
from deltakit.core.method import METHODS, Method, Selector
from deltakit.core.mixed_batch import Batch, holding
from deltakit.core.paths import (
    above,
    held_at,
    is_callable,
    is_of,
    join,
    name_of,
    own_modules,
    own_parameters,
    parent_of,
    split_rows,
    tensors_in,
    tensors_of,
    type_names,
)
from deltakit.core.record import Record, Site, key_of, label_of, parameters_of, records_of, shapes_of, sites_of, word_of
from deltakit.core.sharding import class_name, fill, is_first, is_sharded, wait_for_all, whole
from deltakit.core.target import Reading, Target

__all__ = [
    "METHODS",
    "Batch",
    "DeltaModule",
    "Ledger",
    "Method",
    "Reading",
    "Record",
    "Rows",
    "Selector",
    "Site",
    "Target",
    "above",
    "can_scale",
    "class_name",
    "expand",
    "fill",
    "fold",
    "held_at",
    "hidden_input",
    "hidden_output",
    "holding",
    "is_callable",
    "is_compute_dtype",
    "is_conv1d",
    "is_first",
    "is_of",
    "is_sharded",
    "join",
    "key_of",
    "label_of",
    "linear_sizes",
    "name_of",
    "own_modules",
    "own_parameters",
    "parameters_of",
    "parent_of",
    "projection_sizes",
    "records_of",
    "rows_where",
    "shapes_of",
    "sites_of",
    "span",
    "split_rows",
    "tensors_in",
    "tensors_of",
    "type_names",
    "wait_for_all",
    "whole",
    "wide",
    "word_of",
]
