"""Reports, trees, text and HTML: everything that is printed."""

from deltakit.view.display import View, Visualization, show
from deltakit.view.method_table import MethodRow, MethodTable
from deltakit.view.page import bar, heading, page, paragraph, preformatted, table
from deltakit.view.report import Line, described, report, share, states

__all__ = [
    "Line",
    "MethodRow",
    "MethodTable",
    "View",
    "Visualization",
    "bar",
    "described",
    "heading",
    "page",
    "paragraph",
    "preformatted",
    "report",
    "share",
    "show",
    "states",
    "table",
]
