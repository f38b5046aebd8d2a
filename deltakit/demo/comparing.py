"""Compares methods on the user's own texts."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from deltakit.demo.recipes import Recipe
from deltakit.demo.report import Report, counted, learned, say
from deltakit.demo.results import verdict
from deltakit.demo.run import picture, tell
from deltakit.demo.task import Task
from deltakit.demo.training import accuracy_of
from deltakit.demo.trials import run_all


def compare(
    task: Task,
    recipes: Sequence[Recipe],
    *,
    model: str,
    data: str,
    epochs: int,
    seeds: int,
    out: Path | None,
    console: Console,
) -> Report:
    """Trains each recipe with each seed, prints the results, and returns all of it.

    Args:
        task: the texts and the backbone.
        model, data: what the user calls the backbone and the file of texts.
        epochs: the number of passes over the texts.
        out: where to save the deltas of the first seed; None to keep none of them.
    """
    first = next(recipe for recipe in recipes if recipe.methods)
    untrained, view = picture(first, task, console)
    size = f"{len(task.train):,} rows of {data} with {len(task.classes)} labels"
    how = f"{counted(epochs, 'epoch')}, {counted(seeds, 'seed')}"
    about = f"{size}, {how}; accuracy on {len(task.valid):,} others"
    say(console, f"Training {len(recipes)} ways on {about}")
    with TemporaryDirectory() as spare:
        found = run_all(recipes, task, epochs=epochs, seeds=seeds, out=out or Path(spare), console=console)
    tell(found.results, accuracy_of(untrained, task.valid, task.pad), console)
    best = max(
        (recipe for recipe in recipes if recipe.methods),
        key=lambda recipe: next(r.accuracy for r in found.results if r.title == recipe.title),
    )
    notes = learned("Texts", task, untrained, found.predictions[best.title], by=best.title)
    sentence = verdict(found.results, examples=len(task.valid))
    name = best.methods[0].name
    following = [
        "Next:",
        f"  deltakit plan {model} --{name.replace('_', '-')} default     what it attaches, and where",
        f"  deltakit methods {name}     what it changes, what it can do, and its paper",
    ]
    if out is not None:
        following.append(f"  deltakit inspect {out / best.title.lower()}     what is in its file")
    say(console, *notes, "", sentence, *following)
    return Report(f"Deltas on {data}", sentence, about, found.results, view, notes, following)
