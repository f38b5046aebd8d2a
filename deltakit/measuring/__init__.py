"""What a model holds, costs and has changed: the census of its names, its bytes, and its differences from another."""

from deltakit.measuring.accounting import account
from deltakit.measuring.census import targets
from deltakit.measuring.comparing import diff

__all__ = ["account", "diff", "targets"]
