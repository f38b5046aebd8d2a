"""What a prompt model predicts for an example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """The prediction for one example.

    `probabilities` has the probability of each class, `words` for each slot the words that the backbone finds most likely
    there, with their probabilities among the full vocabulary.
    """

    probabilities: Mapping[str, float]
    words: Sequence[Sequence[tuple[str, float]]] = ()

    @property
    def label(self) -> str:
        """The class with the highest probability."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])
