"""The command line: each command reads its arguments, calls one function, and prints."""

from deltakit.cli.app import main

__all__ = ["main"]
