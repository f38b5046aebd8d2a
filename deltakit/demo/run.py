"""The demo: compares deltas on SNIPS, loads a saved one onto a fresh backbone, and detaches it."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from deltakit.delta import attach, load
from deltakit.demo.beside_peft import beside_peft
from deltakit.demo.one_batch import in_one_batch
from deltakit.demo.recipes import RECIPES, Recipe
from deltakit.demo.report import Report, counted, is_ascii, learned, say
from deltakit.demo.results import Result, bars_of, table_of, verdict
from deltakit.demo.task import Task
from deltakit.demo.task import bundled_model as bundled_model
from deltakit.demo.task import prepare as prepare
from deltakit.demo.training import accuracy_of, predict
from deltakit.demo.trials import run_all
from deltakit.errors import OptionError
from deltakit.view import View, show


def run(task: Task, *, model: str, epochs: int, out: Path, full: bool, console: Console) -> Report:
    """Trains every recipe, prints the results, saves the deltas below `out`, and returns all of it.

    Args:
        task: the requests and the backbone.
        model: what the user calls the backbone.
        epochs: the number of passes over the training requests.
        full: whether to run full fine-tuning too.

    Raises:
        OptionError: if the final check of the demo fails.
    """
    started = time.perf_counter()
    lora = RECIPES[1]
    untrained, view = picture(lora, task, console)
    recipes = [recipe for recipe in RECIPES if full or not recipe.full]
    about = f"{len(task.train):,} of 4,000 requests of SNIPS, {counted(epochs, 'epoch')}; accuracy on {len(task.valid)} others"
    say(console, f"Training {len(recipes)} ways on {about}")
    found = run_all(recipes, task, epochs=epochs, seeds=1, out=out, console=console)
    tell(found.results, accuracy_of(untrained, task.valid, task.pad), console)
    notes = learned("Requests", task, untrained, found.predictions[lora.title], by=lora.title)
    notes += beside_peft(task, lora.methods)
    say(console, *notes)
    together, alike = in_one_batch(task, recipes, found.predictions, out)
    loaded, exact = _proof(found.predictions[lora.title], out / "lora", task)
    proof = [*together, *loaded]
    if not (alike and exact):
        raise OptionError(f"demo: a comparison failed; please report it with all of the text above. {' '.join(proof)}")
    say(console, *proof)
    sentence = verdict(found.results, examples=len(task.valid))
    following = [
        "Next:",
        f"  deltakit show {model} --lora default     where the delta goes",
        f"  deltakit inspect {out / 'lora'}     what is in its file",
        f"  deltakit compare {model} YOUR.csv     the same with your own texts and labels",
    ]
    say(console, "", sentence, *following, f"Done in {time.perf_counter() - started:.0f} s; the deltas are in {out}")
    return Report("Deltas on SNIPS", sentence, about, found.results, view, [*notes, *proof], following)


def picture(recipe: Recipe, task: Task, console: Console) -> tuple[Tensor, View]:
    """Prints the tree of the backbone with a recipe's delta; returns what it predicts without the delta, and the tree."""
    backbone = task.fresh()
    untrained = predict(backbone, task.valid, task.pad)
    attach(backbone, *recipe.methods, train=task.new)
    view = show(backbone)
    console.print(f"[bold]The backbone with {recipe.title}[/], with equal parts folded:\n", view, "")
    return untrained, view


def tell(results: Sequence[Result], untrained: float, console: Console) -> None:
    """Prints the table and the bars.

    Args:
        untrained: the accuracy of the backbone before training, in [0, 1].
    """
    console.print("", table_of(results), f"Without training: {untrained:.1%}", "")
    console.print(
        "Accuracy, from the fewest trained parameters to the most:", bars_of(results, ascii=is_ascii(console)), ""
    )


def _proof(trained: Tensor, folder: Path, task: Task) -> tuple[list[str], bool]:
    """Loads a saved delta onto a fresh backbone, detaches it, and compares predictions and weights.

    Args:
        trained: the predictions of the delta before it was saved.

    Returns:
        What was found, and whether all of it is as it must be.
    """
    backbone = task.fresh()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    bare = predict(backbone, task.valid, task.pad)
    loaded = load(folder, backbone)
    same = predict(backbone, task.valid, task.pad).equal(trained)
    loaded.detach()
    after = backbone.state_dict()
    exact = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = predict(backbone, task.valid, task.pad).equal(bare)
    lines = [
        f"The saved LoRA on a fresh backbone: all {len(task.valid)} predictions are the same: {same}",
        f"Detached: every weight is bit-exact as before: {exact}; the predictions are the bare backbone's: {again}",
    ]
    return lines, same and exact and again
