"""The only room that registers hooks.

Output hooks on targets, weight patches for weights that are read directly, the check of the first forward, and the guards
that stand on a backbone while it holds deltas.
"""

from deltakit.injection.backbone_guards import watch, watch_rows
from deltakit.injection.first_forward import watch_first_forward
from deltakit.injection.hooks import put, take

__all__ = ["put", "take", "watch", "watch_first_forward", "watch_rows"]
