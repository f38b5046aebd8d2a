"""KnowledgeableVerbalizer (KPT): many words a class, cleaned by what the backbone says about unlabelled texts.

Hu et al. 2022, https://arxiv.org/abs/2108.02035, sections 3.2 (refinement) and 3.3 (use of the words).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, product
from deltakit.prompting.verbalizers.word_ids import Multi, Words
from deltakit.prompting.verbalizers.words import WordVerbalizer


class KnowledgeableVerbalizer(WordVerbalizer):
    """Many words for each class, such as from a knowledge base. Words that do not serve are dropped by `PromptModel.refine`.

    The first word of each class is its name, and always stays.

    Args:
        tokenizer, words, prefix, multi: as of `WordVerbalizer`; words of several tokens are dropped by default.
        learn_weights: whether each word has a trained weight: log p(class) is then the mean with weights softmax(weights).

    Raises:
        OptionError: as of `WordVerbalizer`, and if the name of a class would be dropped.
    """

    kept: Tensor

    @checked
    def __init__(
        self, tokenizer: Any, words: Words, *, prefix: str = " ", multi: Multi = "drop", learn_weights: bool = True
    ) -> None:
        super().__init__(tokenizer, words, prefix=prefix, multi=multi)
        self._check_names(words)
        self.learn_weights = learn_weights
        self.weights = nn.Parameter(torch.zeros(len(self.label_words))) if learn_weights else None
        self.register_buffer("kept", torch.ones(len(self.label_words), dtype=torch.bool))

    def _check_names(self, words: Words) -> None:
        first = dict(reversed([(one.label, one.word) for one in self.label_words]))
        for label, (name, own) in enumerate(words.items()):
            word = own if isinstance(own, str) else own[0]
            if word != first[label]:
                # The next word would be compared with all others as the name of the class.
                raise OptionError(
                    f"{type(self).__name__}: {word!r}, the name of the class {name!r}, is no single token, so it would be "
                    "left out; write a word of one token first, or pass multi='mean'"
                )

    def belongs(self) -> Bool[Tensor, "classes words"]:
        return super().belongs() & self.kept

    def shares(self, dtype: torch.dtype) -> Float[Tensor, "classes words"]:
        if self.weights is None:
            return super().shares(dtype)
        return self.weights.to(dtype).expand(len(self.classes), -1).masked_fill(~self.belongs(), -torch.inf).softmax(-1)

    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        found = self.word_logits(output)
        words = (found - self.prior.to(found)).masked_fill(~self.kept, -torch.inf).log_softmax(-1)
        # Dropped words have no share, and 0 * -inf is no number.
        return product(words.masked_fill(~self.kept, 0), self.shares(words.dtype)).log_softmax(-1)

    @torch.no_grad()
    def refine(self, word_log_probs: Float[Tensor, "examples words"], *, drop: float = 0.5) -> None:
        """Drops words that are rare in general, or say no more about their class than about others, and sets the prior.

        Rare: the share `drop` of all words with the lowest mean probability over the examples. Relevance: the cosine between
        the probabilities of a word and of the name of a class over the examples; a word stays if the one with its own class is
        at least the mean of those with the others.

        Raises:
            OptionError: if `drop` is not in [0, 1).
        """
        if not 0 <= drop < 1:
            raise OptionError(f"refine(drop={drop}): expected the share of words to drop, at least 0 and below 1")
        self.calibrate(word_log_probs)
        named = self._names()
        names = torch.zeros_like(self.kept)
        names[named] = True
        rare = self.prior.argsort()[: int(drop * len(self.prior))]
        kept = self._relevant(word_log_probs.exp(), named)
        kept[rare] = False
        self.kept.copy_(kept | names)

    def _names(self) -> list[int]:
        labels = self.label_of.tolist()
        return [labels.index(label) for label in range(len(self.classes))]

    def _relevant(self, probabilities: Float[Tensor, "examples words"], names: list[int]) -> Bool[Tensor, " words"]:
        profiles = nn.functional.normalize(probabilities, dim=0)
        with_names = profiles.T @ profiles[:, names]
        own = with_names.gather(1, self.label_of[:, None])[:, 0]
        others = max(1, len(self.classes) - 1)
        return own * others >= with_names.sum(1) - own

    def dropped(self) -> list[str]:
        """Returns the words that `refine` has dropped."""
        return [one.word for one, kept in zip(self.label_words, self.kept.tolist(), strict=True) if not kept]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "kind": "knowledgeable", "learn_weights": self.learn_weights}
