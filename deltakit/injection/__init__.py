"""Registers and removes all hooks of deltakit. No other package does.

There are output hooks on targets, weight patches for weights that are read directly, the check of the first forward, and
backbone guards that stay while a backbone has deltas.
"""

from deltakit.injection.backbone_guards import watch
from deltakit.injection.first_forward import watch_first_forward
from deltakit.injection.hooks import put, take

__all__ = ["put", "take", "watch", "watch_first_forward"]
