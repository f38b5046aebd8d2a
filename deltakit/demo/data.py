"""The SNIPS data: requests to an assistant, with one of seven intents each. Source and licence (CC0): `snips/README.md`."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One request as token ids, and the index of its intent."""

    ids: list[int]
    label: int


def read(split: str) -> list[tuple[str, str]]:
    """Returns the requests of a split, "train" (4,000) or "valid" (700), each with its intent."""
    text = (files("deltakit.demo") / "snips" / f"{split}.tsv").read_text(encoding="utf-8")
    pairs = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    return [(request, intent) for request, intent in pairs]


def intents() -> list[str]:
    """Returns the seven intents in the order of their indices."""
    return sorted({intent for _, intent in read("train")})


def encode(requests: Sequence[tuple[str, str]], tokenizer: Any, classes: Sequence[str] = ()) -> list[Example]:
    """Returns the requests as examples of at most 64 token ids each.

    Args:
        classes: the labels in the order of their indices; by default the seven intents.
    """
    labels = {intent: index for index, intent in enumerate(classes or intents())}
    encoded = tokenizer([request for request, _ in requests], truncation=True, max_length=64)["input_ids"]
    return [Example(ids, labels[intent]) for ids, (_, intent) in zip(encoded, requests, strict=True)]


def batches(
    examples: Sequence[Example], size: int, pad: int, *, seed: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yields padded batches of examples of similar length: in random order with a seed, else ordered by length.

    Args:
        size: the number of examples in a batch.
        pad: the token id of padding.
    """
    order = list(examples)
    # With shuffling, examples are sorted within eight batches only: that keeps padding low and the order random.
    window = len(order) if seed is None else 8 * size
    if seed is not None:
        random.Random(seed).shuffle(order)
    chunks = [sorted(order[i : i + window], key=lambda e: len(e.ids)) for i in range(0, len(order), window)]
    found = [chunk[i : i + size] for chunk in chunks for i in range(0, len(chunk), size)]
    if seed is not None:
        random.Random(seed).shuffle(found)
    for batch in found:
        longest = max(len(example.ids) for example in batch)
        ids = torch.tensor([example.ids + [pad] * (longest - len(example.ids)) for example in batch])
        mask = torch.tensor([[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in batch])
        yield {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([e.label for e in batch])}
