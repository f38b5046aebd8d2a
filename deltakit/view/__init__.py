"""Reports, trees, text and HTML: everything that is printed."""

from deltakit.view.display import View, Visualization, show
from deltakit.view.method_table import MethodRow, MethodTable
from deltakit.view.printed import Printed, Table, binary_size
from deltakit.view.report import Line, described, report, share, states

__all__ = [
    "Line",
    "MethodRow",
    "MethodTable",
    "Printed",
    "Table",
    "View",
    "Visualization",
    "binary_size",
    "described",
    "report",
    "share",
    "show",
    "states",
]
