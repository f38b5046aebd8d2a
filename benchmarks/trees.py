"""Prints how large the trees of well-known models are, and how long they take, also for 58,000 modules.

    python benchmarks/trees.py [--table benchmarks/trees.md] [--only-times]

The first table has the rows of each tree, and the cells of its widest line where 80, 120 and 200 are allowed; "cut" is the
number of lines with shapes or words left out for it. The second has the least processor time of three calls. Of `dk.pick` it
is what the terminal, the page and the notebook wait for, without their own drawing.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from rich.cells import cell_len
from torch import nn

import deltakit as dk
from deltakit.picking.picker import Picker, state_of, tree_of
from support.large_models import MODELS, Expert, with_delta

WIDTHS = (80, 120, 200)


class Block(nn.Module):
    """Attention and 256 experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({f"{letter}_proj": nn.Linear(512, 512) for letter in "qkvo"})
        self.norms = nn.ModuleList(nn.LayerNorm(512) for _ in range(2))
        self.experts = nn.ModuleList(Expert() for _ in range(256))


LARGE: dict[str, Callable[[], nn.Module]] = {
    "57 blocks of 256 experts": lambda: nn.ModuleList(Block() for _ in range(57)),
    "19,500 blocks that all differ": lambda: nn.ModuleList(
        nn.Sequential(nn.Linear(1, size), nn.LayerNorm(size)) for size in range(1, 19_501)
    ),
}


def sizes(model: nn.Module) -> list[str]:
    """Returns the cells of a line of the first table."""
    texts = {width: str(dk.show(model, width=width)).splitlines() for width in WIDTHS}
    rows = sum(line[0] in "r├└│ " for line in texts[80])
    cells = [f"{sum(1 for _ in model.modules()):,}", str(rows)]
    for lines in texts.values():
        cells.append(f"{max(map(cell_len, lines))} ({sum('…' in line for line in lines)} cut)")
    return cells


def seconds(call: Callable[[], Any]) -> str:
    """Returns the least processor time of three calls."""
    found = []
    for _ in range(3):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return f"{min(found):.3f}"


def calls(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Returns what is measured on a large model."""
    return {
        "print(dk.show(model))": lambda: str(dk.show(model)),
        "dk.pick(model)": lambda: picker_data(model),
        "dk.targets(model)": lambda: str(dk.targets(model)),
        "dk.account(model)": lambda: str(dk.account(model)),
        "dk.roles(model)": lambda: str(dk.roles(model)),
        "dk.plan(model, dk.LoRA(r=1))": lambda: str(dk.plan(model, dk.LoRA(r=1))),
        "dk.diff(model, model)": lambda: str(dk.diff(model, model)),
    }


def picker_data(model: nn.Module) -> str:
    """Returns what the page and the widget show first."""
    picker = Picker(model)
    return json.dumps([tree_of(picker), state_of(picker)])


def printed(lines: list[str], *cells: str) -> None:
    """Prints a line of a table, and adds it to the lines of the file."""
    lines.append(f"| {' | '.join(cells)} |")
    print(lines[-1], flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only-times", action="store_true")
    given = parser.parse_args()
    lines = ["# Trees of large models", "", "Written by `python benchmarks/trees.py --table benchmarks/trees.md`.", ""]
    if not given.only_times:
        printed(lines, "model", "modules", "rows", *(f"widest line at {width}" for width in WIDTHS))
        printed(lines, *["---"] * (3 + len(WIDTHS)))
        for name in MODELS:
            printed(lines, name, *sizes(with_delta(name)))
        lines.append("")
    models = {}
    for name, make in LARGE.items():
        with torch.device("meta"):
            models[name] = make()
    counts = [f"{name}: {sum(1 for _ in model.modules()):,} modules" for name, model in models.items()]
    printed(lines, "processor time in seconds", *counts)
    printed(lines, *["---"] * (1 + len(counts)))
    for call in calls(nn.Module()):
        printed(lines, f"`{call}`", *(seconds(calls(model)[call]) for model in models.values()))
    if given.table is not None:
        given.table.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
