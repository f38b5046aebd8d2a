"""Runs three of the demo's deltas in one batch: each request has its own delta, and the classifier trained with it."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deltakit.delta import attach, rows
from deltakit.demo.data import batches
from deltakit.demo.recipes import Recipe
from deltakit.demo.task import Task
from deltakit.files import DELTA_FILES, read_tensors
from deltakit.selection import select

COUNT, BESIDE = 12, 3


class OwnHeads(nn.Module):
    """Stands for a classifier, and gives each example the classifier of its own delta."""

    def __init__(self, head: nn.Module, path: str, names: Sequence[str], saved: dict[str, dict[str, Tensor]]) -> None:
        super().__init__()
        self.names = names
        self.heads: dict[str, nn.Module] = {name: copy.deepcopy(head) for name in dict.fromkeys(names)}
        for name, own in self.heads.items():
            start = f"{path}."
            values = {key.removeprefix(start): value for key, value in saved[name].items() if key.startswith(start)}
            own.load_state_dict(values)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.heads[name](x[i : i + 1]) for i, name in enumerate(self.names)])


@torch.no_grad()
def in_one_batch(
    task: Task, recipes: Sequence[Recipe], predictions: dict[str, Tensor], out: Path
) -> tuple[list[str], bool]:
    """Returns what to print, and whether all predictions are those of each delta alone.

    Args:
        predictions: what each recipe predicts alone, by its title.
        out: the folder below which the deltas were saved.
    """
    own = [recipe for recipe in recipes if recipe.methods][:BESIDE]
    backbone = task.fresh()
    saved = {}
    for recipe in own:
        # Without the classifier, of which there can be one alone in a backbone.
        delta = attach(backbone, *recipe.methods, name=recipe.title, train=())
        saved[recipe.title] = read_tensors(out / recipe.title.lower() / DELTA_FILES[0])
        delta.load_state_dict({name: saved[recipe.title][name] for name in delta.state_dict()})
    # As `predict` has it: these are the first predictions.
    (batch, *_) = batches(task.valid, 100, task.pad)
    count = min(COUNT, len(batch["labels"]))
    names = [own[number % len(own)].title for number in range(count)]
    for path in select(backbone, task.new):
        backbone.set_submodule(path, OwnHeads(backbone.get_submodule(path), path, names, saved))
    with rows(backbone, names):
        found = backbone(**{key: value[:count] for key, value in batch.items() if key != "labels"}).logits.argmax(-1)
    same = all(
        int(label) == int(predictions[name][i]) for i, (label, name) in enumerate(zip(found, names, strict=True))
    )
    titles = ", ".join(recipe.title for recipe in own)
    return [f"{titles} in one batch of {count} requests: all predictions are those of each alone: {same}"], same
