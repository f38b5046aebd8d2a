"""MixedVerbalizer: several verbalizers for one slot, such as words and prototypes, by standardized scores.

Cui et al. 2022, https://arxiv.org/abs/2203.09770, which adds trained prototypes to a manual verbalizer in this way.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer


class MixedVerbalizer(Verbalizer):
    """log p(class) = log_softmax of mean_i z_i(class), where z_i = (s_i - mean of s_i) / deviation of s_i over the classes.

    s_i are the log-probabilities of verbalizer i. Cosines of prototypes and logits of words have other units, and without
    this the one with the larger numbers would decide alone. The deviation divides by the number of classes less one. Its loss
    is the sum of their own losses.

    Args:
        verbalizers: at least two, with the same classes in the same order and the same number of slots.

    Raises:
        OptionError: if there are fewer, one is a MixedVerbalizer, their classes or slots differ, or there are fewer than three
            classes.
    """

    @checked
    def __init__(self, verbalizers: Sequence[Verbalizer]) -> None:
        where = f"MixedVerbalizer({[type(one).__name__ for one in verbalizers]})"
        if len(verbalizers) < 2 or any(isinstance(one, MixedVerbalizer) for one in verbalizers):
            raise OptionError(f"{where}: expected at least two verbalizers, none of them mixed; list all of them here")
        first = verbalizers[0]
        super().__init__(first.classes, num_slots=first.num_slots)
        for one in verbalizers[1:]:
            if (one.classes, one.num_slots) != (first.classes, first.num_slots):
                raise OptionError(
                    f"{where}: they have the classes {first.classes} in {first.num_slots} slots, and {one.classes} in "
                    f"{one.num_slots}; write the same classes in the same order, and as many slots"
                )
        if len(self.classes) < 3:
            # Of two numbers the standardized ones are always the same two: only their order is left.
            raise OptionError(
                f"{where}: expected at least three classes, found {len(self.classes)}: with two, a standardized score only "
                "says which class is ahead, and two verbalizers that disagree are tied; use an Ensemble of PromptModels, one "
                "for each verbalizer"
            )
        self.members = torch.nn.ModuleList(verbalizers)

    @property
    def token_ids(self) -> list[int]:
        return sorted({one for member in self._verbalizers() for one in member.token_ids})

    @property
    def scored_words(self) -> list[tuple[int, ...]]:
        return [word for member in self._verbalizers() for word in member.scored_words]

    def _verbalizers(self) -> list[Verbalizer]:
        return [member for member in self.members if isinstance(member, Verbalizer)]

    def _own(self, output: SlotOutput) -> Iterator[tuple[Verbalizer, SlotOutput]]:
        """Yields the members, each with what it reads: the scores of its own words."""
        start = 0
        for member in self._verbalizers():
            end = start + len(member.scored_words)
            scores = None if output.word_scores is None or start == end else output.word_scores[:, start:end]
            yield member, output._replace(word_scores=scores)
            start = end

    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        return torch.stack([standardized(member(own)) for member, own in self._own(output)]).mean(0).log_softmax(-1)

    def loss(self, output: SlotOutput, labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Returns the sum of the verbalizers' own losses."""
        return torch.stack([member.loss(own, labels) for member, own in self._own(output)]).sum()

    def observed(self, output: SlotOutput) -> tuple[Tensor, ...]:
        found = tuple(one for member, own in self._own(output) if member.token_ids for one in member.observed(own))
        return found or super().observed(output)

    def calibrate(self, *observed: Float[Tensor, "examples _"]) -> None:
        rest = list(observed)
        for member in self._verbalizers():
            if member.token_ids:
                # One for each slot.
                member.calibrate(*rest[: member.num_slots])
                del rest[: member.num_slots]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "mixed", "members": [member.to_dict() for member in self._verbalizers()]}


def standardized(scores: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """Returns the scores less their mean over the classes, divided by their deviation; zeros where all are equal."""
    centred = scores - scores.mean(-1, keepdim=True)
    # Where all classes are equal, there is nothing to divide.
    deviation = scores.std(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return centred / deviation
