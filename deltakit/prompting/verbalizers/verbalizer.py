"""Verbalizer: turns what a backbone predicts in a template's slots into log-probabilities of classes."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltakit.errors import OptionError


class SlotOutput(NamedTuple):
    """What the backbone has computed for the slots, and nothing else.

    `hidden` is the input of its language-model head. `word_scores` are log-probabilities of whole words, only for a verbalizer
    with `multi="score"`.
    """

    logits: Float[Tensor, "batch slots vocabulary"]
    hidden: Float[Tensor, "batch slots d"]
    word_scores: Float[Tensor, "batch words"] | None = None

    def to(self, device: torch.device) -> "SlotOutput":
        """Returns it on a device."""
        scores = None if self.word_scores is None else self.word_scores.to(device)
        return SlotOutput(self.logits.to(device), self.hidden.to(device), scores)


class Verbalizer(nn.Module):
    """The base of all verbalizers. A subclass writes `forward`, and `loss` if it is not the cross-entropy.

    Args:
        classes: the names of the classes, in the order of their indices.
        num_slots: how many slots a template must have.

    Raises:
        OptionError: if there are no classes, or one is there twice or no text.
    """

    def __init__(self, classes: Sequence[str], *, num_slots: int = 1) -> None:
        super().__init__()
        self.classes, self.num_slots = tuple(classes), num_slots
        where = f"{type(self).__name__}(classes={list(classes)[:8]!r})"
        if not self.classes or not all(isinstance(name, str) and name for name in self.classes):
            raise OptionError(f"{where}: expected the names of the classes, at least one")
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if twice:
            raise OptionError(f"{where}: the class {twice[0]!r} is there twice; write each once")

    @property
    def token_ids(self) -> list[int]:
        """The ids in the backbone's vocabulary that it reads."""
        return []

    @property
    def scored_words(self) -> list[tuple[int, ...]]:
        """The words, as ids, whose log-probabilities it reads in `SlotOutput.word_scores`."""
        return []

    @abstractmethod
    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        """Returns the log-probabilities of the classes."""

    def loss(self, output: SlotOutput, labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Returns the mean loss of a batch: by default the cross-entropy of the classes."""
        return F.nll_loss(self(output), labels)

    def loss_and_scores(
        self, output: SlotOutput, labels: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch classes"]]:
        """Returns the loss of a batch, and the log-probabilities of the classes."""
        if type(self).loss is Verbalizer.loss:
            # The loss reads them, so they are computed once.
            found = self(output)
            return F.nll_loss(found, labels), found
        return self.loss(output, labels), self(output)

    def observed(self, output: SlotOutput) -> tuple[Tensor, ...]:
        """Returns what `calibrate` needs of a batch: log-probabilities [batch, words] among the vocabulary, for each slot.

        Raises:
            OptionError: if it has no words.
        """
        raise OptionError(f"{type(self).__name__}: it has no words, so it cannot be calibrated; use a WordVerbalizer")

    def calibrate(self, *observed: Float[Tensor, "examples _"]) -> None:
        """Sets the words' priors: the logarithms of their mean probabilities over examples (`PromptModel.calibrate` calls it).

        Args:
            observed: what `observed` has returned for all of them.
        """
        raise NotImplementedError

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns its options as plain data, for files."""


def product(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "k d"], bias: Float[Tensor, " k"] | None = None
) -> Float[Tensor, "n k"]:
    """Returns x weight^T + bias in at least float32.

    Also under autocast: its three digits are too few for log-probabilities of classes, whose differences decide.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
