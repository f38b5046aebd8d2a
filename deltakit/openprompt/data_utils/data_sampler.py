"""A few examples of a data set."""

import random
from collections.abc import Sequence
from typing import Any

from deltakit.core import checked
from deltakit.errors import OptionError, warn


class FewShotSampler:
    """Draws a few examples: `num_examples_total` of all, or `num_examples_per_label` of each class.

    Args:
        also_sample_dev: whether a second sample is drawn from the rest (or from a second data set), for validation.
        num_examples_total_dev, num_examples_per_label_dev: how many are in it; by default as many as in the first one.

    Raises:
        OptionError: if both numbers are given, or neither.
    """

    @checked
    def __init__(
        self,
        num_examples_total: int | None = None,
        num_examples_per_label: int | None = None,
        also_sample_dev: bool = False,
        num_examples_total_dev: int | None = None,
        num_examples_per_label_dev: int | None = None,
    ) -> None:
        if (num_examples_total is None) == (num_examples_per_label is None):
            raise OptionError("FewShotSampler: pass num_examples_total or num_examples_per_label, and not both")
        self.also_sample_dev = also_sample_dev
        self._train = (num_examples_total, num_examples_per_label)
        own = (num_examples_total_dev, num_examples_per_label_dev)
        self._dev = self._train if own == (None, None) else own

    def __call__(
        self, train_dataset: Sequence[Any], valid_dataset: Sequence[Any] | None = None, seed: int | None = None
    ) -> Any:
        """Returns the sample, or with a second data set or `also_sample_dev` the two samples. The same seed gives the same."""
        generator = random.Random(seed)
        chosen = self._sample(train_dataset, list(range(len(train_dataset))), *self._train, generator)
        train = [train_dataset[place] for place in chosen]
        if not self.also_sample_dev:
            return train if valid_dataset is None else (train, valid_dataset)
        source = train_dataset if valid_dataset is None else valid_dataset
        used = set(chosen) if valid_dataset is None else set()
        left = [place for place in range(len(source)) if place not in used]
        return train, [source[place] for place in self._sample(source, left, *self._dev, generator)]

    def _sample(
        self, data: Sequence[Any], places: list[int], total: int | None, each: int | None, generator: random.Random
    ) -> list[int]:
        generator.shuffle(places)
        if each is None:
            return places[:total]
        by_label: dict[Any, list[int]] = {}
        for place in places:
            by_label.setdefault(data[place].label, []).append(place)
        for label, own in by_label.items():
            if len(own) < each:
                warn(f"FewShotSampler: the label {label} has {len(own)} examples left, fewer than {each}")
        found = [place for own in by_label.values() for place in own[:each]]
        generator.shuffle(found)
        return found
