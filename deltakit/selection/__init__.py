"""Text and structure become targets.

The grammar of selectors, the index of a backbone's modules and parameters, the roles inferred from its structure, the parts
of fused projections, and the weights that a forward reads directly.
"""

from deltakit.selection.default_positions import Found
from deltakit.selection.feature_axis import feature_axis, features_last, output_features
from deltakit.selection.grammar import match
from deltakit.selection.index import BackboneIndex
from deltakit.selection.option_selectors import OptionSelectors
from deltakit.selection.role_inference.ends import heads_of, outermost_models, told_by
from deltakit.selection.role_inference.names import FUSED, FUSED_KV, PROJECTIONS, says_attention
from deltakit.selection.role_table import RoleTable, roles
from deltakit.selection.shortest_selectors import shortest_selectors
from deltakit.selection.target_search import find_targets, select

__all__ = [
    "FUSED",
    "FUSED_KV",
    "PROJECTIONS",
    "BackboneIndex",
    "Found",
    "OptionSelectors",
    "RoleTable",
    "feature_axis",
    "features_last",
    "find_targets",
    "heads_of",
    "match",
    "outermost_models",
    "output_features",
    "roles",
    "says_attention",
    "select",
    "shortest_selectors",
    "told_by",
]
