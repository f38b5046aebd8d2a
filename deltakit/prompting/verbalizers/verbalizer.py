"""Verbalizer: turns what a backbone predicts in a template's slots into log-probabilities of classes."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class SlotOutput(NamedTuple):
    """What the backbone has computed for the slots, and nothing else.

    `hidden` is the input of its language-model head. `word_scores` are log-probabilities of whole words, only for a verbalizer
    with `multi="score"`.
    """

    logits: Float[Tensor, "batch slots vocabulary"]
    hidden: Float[Tensor, "batch slots d"]
    word_scores: Float[Tensor, "batch words"] | None = None


class Verbalizer(nn.Module):
    """The base of all verbalizers. A subclass writes `forward`, and `loss` if it is not the cross-entropy.

    Args:
        classes: the names of the classes, in the order of their indices.
        num_slots: how many slots a template must have.
    """

    def __init__(self, classes: Sequence[str], *, num_slots: int = 1) -> None:
        super().__init__()
        self.classes, self.num_slots = tuple(classes), num_slots

    @abstractmethod
    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        """Returns the log-probabilities of the classes."""

    def loss(self, output: SlotOutput, labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Returns the mean loss of a batch: by default the cross-entropy of the classes."""
        return F.nll_loss(self(output), labels)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns its options as plain data, for files."""
