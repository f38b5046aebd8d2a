"""What is said about a comparison besides its table: requests that were learned, what to do next, and a web page of it all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from deltakit.demo.results import HEADS, Result, by_size
from deltakit.demo.task import Task
from deltakit.view import View, bar, heading, paragraph, preformatted, share, table, web_page


@dataclass(frozen=True)
class Report:
    """A finished comparison.

    `about` says on what data it was made, `notes` are other lines that were printed, and `following` what to do next.
    """

    title: str
    verdict: str
    about: str
    results: Sequence[Result]
    tree: View
    notes: Sequence[str]
    following: Sequence[str]

    def html(self) -> str:
        """Returns the comparison as a web page that stands alone."""
        rows = [result.cells() for result in self.results]
        bars = [
            (result.title, share(result.trained, result.total), bar(result.accuracy), f"{result.accuracy:.1%}")
            for result in by_size(self.results)
        ]
        parts = [
            paragraph(self.verdict, strong=True),
            paragraph(self.about),
            table(HEADS, rows),
            heading("Accuracy against trained parameters"),
            table(("method", "of all", "", "accuracy"), bars),
            preformatted("\n".join(self.notes)),
            heading("Where the delta goes"),
            self.tree.html(),
            heading("What to do next"),
            preformatted("\n".join(self.following)),
        ]
        return web_page(self.title, parts)

    def data(self) -> dict[str, Any]:
        """Returns the comparison as plain data."""
        results = [{**asdict(result), "accuracy": result.accuracy} for result in self.results]
        return {"verdict": self.verdict, "about": self.about, "results": results}


def counted(number: int, word: str) -> str:
    """Returns a number with a noun.

    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"


def say(console: Console, *lines: str) -> None:
    """Prints lines of plain text, each as long as it is."""
    console.print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)


def is_ascii(console: Console) -> bool:
    """Returns whether a console's output cannot show blocks."""
    return not console.encoding.lower().startswith("utf")


def learned(what: str, task: Task, before: Tensor, after: Tensor, *, by: str, count: int = 3) -> list[str]:
    """Returns some texts whose label is wrong before training and right after it, a line each, below a heading.

    Args:
        what: what the texts are, in the plural.
        before, after: the predictions, in the order of `predict`.
        by: the title of what has learned them.
        count: the most texts.
    """
    # As `batches` orders them.
    order = sorted(range(len(task.valid)), key=lambda place: len(task.valid[place].ids))
    lines: list[str] = []
    for place, old, new in zip(order, before.tolist(), after.tolist(), strict=True):
        text, label = task.texts[place]
        if old != task.valid[place].label == new and len(lines) < count:
            short = text if len(text) <= 60 else f"{text[:59]}…"
            lines.append(f"  {short!r}: before {task.classes[old]}, now {label}")
    return [f"{what} that {by} has learned:", *lines] if lines else []
