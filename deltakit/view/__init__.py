"""Reports, trees, text and HTML: everything that is printed."""

from deltakit.view.display import View, show
from deltakit.view.method_table import MethodRow, MethodTable
from deltakit.view.report import Line, described, report, share, states
from deltakit.view.structure_graph import Visualization

__all__ = [
    "Line",
    "MethodRow",
    "MethodTable",
    "View",
    "Visualization",
    "described",
    "report",
    "share",
    "show",
    "states",
]
