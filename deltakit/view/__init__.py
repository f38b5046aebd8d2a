"""Reports, trees, text and HTML: everything that is printed."""

from deltakit.view.display import View, show
from deltakit.view.method_table import MethodRow, MethodTable
from deltakit.view.printed import Printed, Table
from deltakit.view.report import Line, described, report, share, states
from deltakit.view.report_page import bar, heading, paragraph, preformatted, table, web_page
from deltakit.view.structure_graph import Visualization
from deltakit.view.units import binary_size

__all__ = [
    "Line",
    "MethodRow",
    "MethodTable",
    "Printed",
    "Table",
    "View",
    "Visualization",
    "bar",
    "binary_size",
    "described",
    "heading",
    "paragraph",
    "preformatted",
    "report",
    "share",
    "show",
    "states",
    "table",
    "web_page",
]
