"""What comparing methods gave: a table, bars, and one sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table
from rich.text import Text

from deltakit.view import share

HEADS = ("method", "trained", "of all", "accuracy", "seconds", "file")
_BAR = 40


@dataclass(frozen=True)
class Result:
    """One method on a task.

    `trained` and `total` are numbers of parameters, `accuracies` the shares of correct predictions with each seed, in [0, 1],
    `seconds` the mean time of a training run, and `file_bytes` the size of the delta's file; None where there is none.
    """

    title: str
    trained: int
    total: int
    accuracies: tuple[float, ...]
    seconds: float
    file_bytes: int | None = None

    @property
    def accuracy(self) -> float:
        return fmean(self.accuracies)

    def cells(self) -> tuple[str, ...]:
        """Returns the cells of its line, in the order of `HEADS`."""
        low, high = min(self.accuracies), max(self.accuracies)
        spread = f" ({low:.1%} to {high:.1%})" if len(self.accuracies) > 1 else ""
        size = "" if self.file_bytes is None else f"{self.file_bytes / 1000:,.0f} kB"
        part = share(self.trained, self.total)
        return (self.title, f"{self.trained:,}", part, f"{self.accuracy:.1%}{spread}", f"{self.seconds:.0f}", size)


def table_of(results: Sequence[Result]) -> Table:
    """Returns the results as a table for `rich`."""
    table = Table(*HEADS)
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        table.add_row(*result.cells())
    return table


def by_size(results: Sequence[Result]) -> list[Result]:
    """Returns the results from the fewest trained parameters to the most."""
    return sorted(results, key=lambda result: result.trained)


def bars_of(results: Sequence[Result], *, ascii: bool) -> Table:
    """Returns accuracy against parameters: a bar for each method, from the fewest trained parameters to the most."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right")
    for result in by_size(results):
        length = round(_BAR * result.accuracy)
        bar = Text(("#" if ascii else "█") * length, style="blue") + Text(
            ("." if ascii else "░") * (_BAR - length), "dim"
        )
        grid.add_row(result.title, share(result.trained, result.total), bar + Text(f" {result.accuracy:.1%}"))
    return grid


def verdict(results: Sequence[Result], *, examples: int) -> str:
    """Returns in one sentence which delta was best, and how it compares with training everything or only the head.

    Args:
        examples: the number of examples on which the accuracy was measured.
    """
    deltas = [result for result in results if result.file_bytes is not None]
    best = max(deltas, key=lambda result: (result.accuracy, -result.trained))
    others = {result.title: result for result in results if result.file_bytes is None}
    parts = [f"{best.title} does best: {best.accuracy:.1%} with {share(best.trained, best.total)} of the parameters"]
    for title, words in (("full fine-tuning", "full fine-tuning"), ("linear probe", "the linear probe")):
        if title in others:
            other = others[title].accuracy
            parts.append(f"{_beside(best.accuracy, other, examples)} {words} ({other:.1%})")
    return f"{parts[0]}, {' and '.join(parts[1:])}." if parts[1:] else f"{parts[0]}."


def _beside(ours: float, other: float, examples: int) -> str:
    """Returns how two accuracies compare. Twice the standard error of their difference is chance."""
    noise = 2 * math.sqrt((ours * (1 - ours) + other * (1 - other)) / examples)
    if abs(ours - other) <= noise:
        return "within chance of"
    return f"{100 * abs(ours - other):.1f} points {'above' if ours > other else 'below'}"
