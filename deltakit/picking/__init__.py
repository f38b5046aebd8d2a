"""Choosing modules by hand: `pick(model)`, in a terminal, on a page of the browser or in a notebook.

One `Picker` holds what is ticked and filtered, and says which selectors that makes. The front ends only show it.
"""

from deltakit.picking.front_ends import pick, picked
from deltakit.picking.picked_modules import Selection

__all__ = ["Selection", "pick", "picked"]
