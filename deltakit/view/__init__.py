"""Reports, trees, text and HTML: everything that is printed."""

from deltakit.view.collector import collector_paused
from deltakit.view.display import View, show
from deltakit.view.folding import folded
from deltakit.view.method_row import MethodRow
from deltakit.view.node import Node
from deltakit.view.printed import Printed, Table, check_width
from deltakit.view.report import Line, described, report, share, states
from deltakit.view.report_page import bar, heading, paragraph, preformatted, table, web_page
from deltakit.view.structure_graph import Visualization
from deltakit.view.tree import build
from deltakit.view.tree_rows import Row, rows
from deltakit.view.units import binary_size, short

__all__ = [
    "Line",
    "MethodRow",
    "Node",
    "Printed",
    "Row",
    "Table",
    "View",
    "Visualization",
    "bar",
    "binary_size",
    "build",
    "check_width",
    "collector_paused",
    "described",
    "folded",
    "heading",
    "paragraph",
    "preformatted",
    "report",
    "rows",
    "share",
    "short",
    "show",
    "states",
    "table",
    "web_page",
]
