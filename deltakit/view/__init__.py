"""Builds everything that deltakit prints: reports, trees, text and HTML."""

from deltakit.view.display import View, Visualization, show
from deltakit.view.report import Line, described, report, share, states

__all__ = ["Line", "View", "Visualization", "described", "report", "share", "show", "states"]
