"""Searches for the positions and methods that are worth a budget of parameters."""

from deltakit.searching.loop import search
from deltakit.searching.structure import Structure

__all__ = ["Structure", "search"]
