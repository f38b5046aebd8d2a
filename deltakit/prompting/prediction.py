"""What a prompt model predicts for an example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


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


def likely_words(
    logits: Float[Tensor, "batch slots vocabulary"], top_k: int, tokenizer: Any
) -> list[list[list[tuple[str, float]]]]:
    """Returns for each example and slot the `top_k` words with the highest probabilities, and these."""
    top_k = min(top_k, logits.shape[-1])
    if not top_k:
        return [[] for _ in logits]
    found = logits.float().softmax(-1).topk(top_k)
    return [
        [
            [(_word(tokenizer, one), chance) for one, chance in zip(ids, chances, strict=True)]
            for ids, chances in zip(own_ids, own_chances, strict=True)
        ]
        for own_ids, own_chances in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def _word(tokenizer: Any, one: int) -> str:
    # Ids beyond the tokenizer's are rows that round the vocabulary up.
    return tokenizer.decode([one]).strip() or str(tokenizer.convert_ids_to_tokens(one))
