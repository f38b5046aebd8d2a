"""Trains one recipe after the other on a task, and says how far it is."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from deltakit.core import num_parameters
from deltakit.delta import attach
from deltakit.demo.recipes import Recipe
from deltakit.demo.results import Result
from deltakit.demo.task import Task
from deltakit.demo.training import BATCH, accuracy_of, predict, train
from deltakit.selection import select

Step = Callable[[float, float], None]


@dataclass
class Trials:
    """The results of recipes, and what each predicts with the first seed by the recipe's title."""

    results: list[Result] = field(default_factory=list)
    predictions: dict[str, Tensor] = field(default_factory=dict)


def run_all(recipes: Sequence[Recipe], task: Task, *, epochs: int, seeds: int, out: Path, console: Console) -> Trials:
    """Trains each recipe with each seed, saves the deltas of the first seed below `out`, and prints a line for each recipe."""
    found = Trials()
    with _progress(console) as start:
        for number, recipe in enumerate(recipes, start=1):
            step = start(recipe.title, seeds * epochs * -(-len(task.train) // BATCH))
            runs = [_trial(recipe, task, epochs, seed, out, step) for seed in range(seeds)]
            accuracies = tuple(result.accuracies[0] for result, _ in runs)
            last = replace(runs[0][0], accuracies=accuracies, seconds=fmean(result.seconds for result, _ in runs))
            found.results.append(last)
            found.predictions[recipe.title] = runs[0][1]
            console.print(
                f"  {number} of {len(recipes)}  {recipe.title}: {last.accuracy:.1%} after {last.seconds:.0f} s of training",
                highlight=False,
            )
    return found


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int], Step]]:
    """Gives a function that starts a live bar, if the console is a terminal, and returns what to call after each step."""
    if not console.is_terminal:
        yield lambda _title, _steps: lambda _loss, _right: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}  right {task.fields[right]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:

        def start(title: str, steps: int) -> Step:
            for task in progress.tasks:
                progress.remove_task(task.id)
            bar = progress.add_task(title, total=steps, loss="", right="")
            # The accuracy of one batch jumps, so it is the mean of the last ones, each counting less than the next.
            mean = [0.0, 0.0]

            def step(loss: float, right: float) -> None:
                mean[:] = 0.9 * mean[0] + 0.1 * right, 0.9 * mean[1] + 0.1
                progress.update(bar, advance=1, loss=f"{loss:.3f}", right=f"{mean[0] / mean[1]:.0%}")

            return step

        yield start


def _trial(recipe: Recipe, task: Task, epochs: int, seed: int, out: Path, step: Step) -> tuple[Result, Tensor]:
    backbone = task.fresh(seed)
    total = num_parameters(backbone)
    delta = attach(backbone, *recipe.methods, train=task.new) if recipe.methods else None
    if delta is None and not recipe.full:
        train_only(backbone, task.new)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    start = time.perf_counter()
    train(backbone, trained, task.train, task.pad, lr=recipe.lr, epochs=epochs, seed=seed, step=step)
    seconds = time.perf_counter() - start
    size = _size(delta.save(out / recipe.title.lower())) if delta is not None and seed == 0 else None
    count = sum(parameter.numel() for parameter in trained)
    predictions = predict(backbone, task.valid, task.pad)
    right = accuracy_of(predictions, task.valid, task.pad)
    return Result(recipe.title, count, total, (right,), seconds, size), predictions


def train_only(backbone: nn.Module, paths: Sequence[str]) -> None:
    """Freezes a backbone, except for the modules that the selectors `paths` select."""
    backbone.requires_grad_(False)
    for module in select(backbone, paths).values():
        module.requires_grad_(True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("delta_*"))
