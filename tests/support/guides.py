"""Reads the guides and the README: their blocks of code, and the code in the columns of their tables."""

import re
from typing import NamedTuple

from support.paths import ROOT

GUIDES = ROOT / "examples" / "guides"


class Table(NamedTuple):
    """A table of Markdown: the heading above it, the names of its columns, and its rows of cells."""

    heading: str
    columns: list[str]
    rows: list[list[str]]

    def column(self, name):
        """The pieces of code in a column, row by row."""
        number = self.columns.index(name)
        return [re.findall(r"`([^`]+)`", row[number]) for row in self.rows]


def blocks(path, language):
    """The fenced blocks of a language in a file."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def tables(path):
    """The tables of a file."""
    found, heading = [], ""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for part in re.split(r"\n\s*\n", text):
        lines = part.strip().splitlines()
        if lines and lines[0].startswith("#"):
            heading = lines[0].lstrip("# ")
        elif lines and lines[0].startswith("|"):
            cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
            # An empty last cell is stripped with the bar around it.
            width = len(lines[1].strip("| ").split("|"))
            found.append(Table(heading, cells[0], [row + [""] * (width - len(row)) for row in cells[2:]]))
    return found


def table(path, heading):
    """The first table under a heading."""
    return next(found for found in tables(path) if found.heading == heading)
