"""Reports, trees, text and HTML: everything that is printed."""

from deltakit.view.display import View, Visualization, show
from deltakit.view.report import Line, described, report, share, states

__all__ = ["Line", "View", "Visualization", "described", "report", "share", "show", "states"]
