"""Two real tasks on which methods are compared: the intents of SNIPS, and the topics of CLINC150."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltakit.demo.data import read

Requests = list[tuple[str, str]]

CLINC = Path(__file__).resolve().parent / "data" / "clinc150"


@dataclass(frozen=True)
class Task:
    """Requests with their classes: a pool to draw training examples from, a split to choose options on, and a test split."""

    classes: list[str]
    pool: Requests
    valid: Requests
    test: Requests

    def train(self, count: int, seed: int) -> Requests:
        """Returns the training examples of a seed."""
        return random.Random(seed).sample(self.pool, min(count, len(self.pool)))


def snips() -> Task:
    """Returns the seven intents of SNIPS. The data has two splits, so the last training requests are for choosing."""
    train = read("train")
    return Task(sorted({intent for _, intent in train}), train[:3700], train[3700:], read("valid"))


def clinc150() -> Task:
    """Returns the ten topics of CLINC150, each with the requests of 15 intents."""
    splits = {}
    for split in ("train", "valid", "test"):
        lines = (CLINC / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        splits[split] = [(request, topic) for request, _, topic in (line.split("\t") for line in lines)]
    return Task(sorted({topic for _, topic in splits["test"]}), splits["train"], splits["valid"], splits["test"])


TASKS: dict[str, Callable[[], Task]] = {"SNIPS": snips, "CLINC150": clinc150}
