"""Turns selectors and the structure of a backbone into targets.

Holds the selector grammar, the index of a backbone's modules and parameters, the roles inferred from its structure, the
feature slices of fused projections, and the weights that a forward reads directly.
"""

from deltakit.selection.feature_axis import along, feature_axis, features_last
from deltakit.selection.index import BackboneIndex
from deltakit.selection.role_inference.names import FUSED, FUSED_KV, PROJECTIONS, says_attention
from deltakit.selection.role_table import RoleTable, roles
from deltakit.selection.targets import find_targets, select

__all__ = [
    "FUSED",
    "FUSED_KV",
    "PROJECTIONS",
    "BackboneIndex",
    "RoleTable",
    "along",
    "feature_axis",
    "features_last",
    "find_targets",
    "roles",
    "says_attention",
    "select",
]
