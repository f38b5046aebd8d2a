"""Reports, trees, text and HTML: everything that is printed."""

from deltakit.view.display import View, Visualization, show
from deltakit.view.method_table import MethodRow, MethodTable
from deltakit.view.report import Line, described, report, share, states
from deltakit.view.report_page import bar, heading, paragraph, preformatted, table, web_page

__all__ = [
    "Line",
    "MethodRow",
    "MethodTable",
    "View",
    "Visualization",
    "bar",
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
