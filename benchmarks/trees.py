"""Prints how large the trees of well-known models are, and how long they take, also for 58,000 modules.

    python benchmarks/trees.py

The first table has the rows of each tree, and the cells of its widest line where 80, 120 and 200 are allowed; "cut" is the
number of lines with shapes or words left out for it. The second has the least processor time of three calls.
"""

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


def printed(*cells: str) -> None:
    """Prints a line of a table."""
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    warnings.simplefilter("ignore")
    printed("model", "modules", "rows", *(f"widest line at {width}" for width in WIDTHS))
    printed(*["---"] * (3 + len(WIDTHS)))
    for name in MODELS:
        printed(name, *sizes(with_delta(name)))
    print()
    printed("model", "modules", "dk.show(model), s", "str(view), s")
    printed(*["---"] * 4)
    for name, make in LARGE.items():
        with torch.device("meta"):
            model = make()
        view = dk.show(model)
        times = seconds(lambda model=model: dk.show(model)), seconds(lambda view=view: str(view))
        printed(name, f"{sum(1 for _ in model.modules()):,}", *times)


if __name__ == "__main__":
    main()
