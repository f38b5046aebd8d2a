"""WordVerbalizer: one or several words stand for each class."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from deltakit.core import checked, wide
from deltakit.errors import OptionError
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer, product
from deltakit.prompting.verbalizers.word_ids import Multi, Words, label_words


class WordVerbalizer(Verbalizer):
    """Words of the vocabulary stand for classes: log p(class) is the mean of its words' log-probabilities, normalized.

    Words compete with each other only: s_w = logit_w - prior_w, log p(w) = s_w - log sum_v exp(s_v) over all words v of all
    classes, log p(class) = log_softmax of the means over the words of each class.

    Args:
        tokenizer: the backbone's tokenizer.
        words: for each class its word, or a list of words.
        prefix: what stands before a word where it is predicted; "" for languages without spaces, or a slot that follows no
            space.
        multi: what is done with a word of several tokens. "refuse": an error that shows its tokens. "mean": the mean of its
            tokens' logits in the slot. "first": its first token alone. "score": the log-probability of the full word, for
            which the backbone is called once for each word (masked models: for each length). "drop": the word is left out.

    Raises:
        OptionError: if a class has no word, a word is unknown, split (with "refuse"), of two classes, or has the same first
            token as one of another class (with "first").
    """

    ids: Tensor
    tokens_read: Tensor
    label_of: Tensor
    prior: Tensor

    @checked
    def __init__(self, tokenizer: Any, words: Words, *, prefix: str = " ", multi: Multi = "refuse") -> None:
        super().__init__(list(words))
        self.prefix, self.multi = prefix, multi
        self.label_words = label_words(tokenizer, words, prefix, multi, type(self).__name__)
        longest = max(len(one.ids) for one in self.label_words)
        table = torch.zeros(len(self.label_words), longest, dtype=torch.long)
        read = torch.ones(len(self.label_words), dtype=torch.long)
        for row, one in enumerate(self.label_words):
            table[row, : len(one.ids)] = torch.tensor(one.ids)
            read[row] = 1 if multi == "first" else len(one.ids)
        # Files have the words, which give these again. The prior is measured.
        self.register_buffer("ids", table, persistent=False)
        self.register_buffer("tokens_read", read, persistent=False)
        self.register_buffer("label_of", torch.tensor([one.label for one in self.label_words]), persistent=False)
        self.register_buffer("prior", torch.zeros(len(self.label_words)))

    @property
    def token_ids(self) -> list[int]:
        return sorted({one for word in self.label_words for one in word.ids})

    @property
    def scored_words(self) -> list[tuple[int, ...]]:
        return [word.ids for word in self.label_words] if self.multi == "score" else []

    def word_log_probs(self, output: SlotOutput) -> Float[Tensor, "batch words"]:
        """Returns the log-probabilities of the words among the full vocabulary, in the slot; of several tokens their mean.

        Raises:
            OptionError: if `multi` is "score", and the output has no scores of words.
        """
        found = self.word_logits(output)
        return found if self.multi == "score" else found - wide(output.logits[:, 0]).logsumexp(-1, keepdim=True)

    def word_logits(self, output: SlotOutput) -> Float[Tensor, "batch words"]:
        """Returns the same but for a constant of each example, which is the same for all words.

        Words compete with each other only, so the constant does not matter for classes, and to compute it and its gradient
        takes more time than all else here: it needs the full vocabulary.

        Raises:
            OptionError: if `multi` is "score", and the output has no scores of words.
        """
        if self.multi == "score":
            if output.word_scores is None:
                raise OptionError(
                    f"{type(self).__name__}: with multi='score' it needs SlotOutput.word_scores; call it through a PromptModel"
                )
            return output.word_scores
        # In at least float32: half precision has three digits, and differences of these numbers decide.
        tokens = wide(output.logits[:, 0][:, self.ids])
        padding = torch.arange(self.ids.shape[1], device=self.ids.device) >= self.tokens_read[:, None]
        return tokens.masked_fill(padding, 0).sum(-1) / self.tokens_read

    def belongs(self) -> Bool[Tensor, "classes words"]:
        """Returns which words stand for which class."""
        return self.label_of == torch.arange(len(self.classes), device=self.label_of.device)[:, None]

    def shares(self, dtype: torch.dtype) -> Float[Tensor, "classes words"]:
        """Returns how much each word counts in its class; the sum of a row is 1."""
        own = self.belongs().to(dtype)
        return own / own.sum(1, keepdim=True)

    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        found = self.word_logits(output)
        words = (found - self.prior.to(found)).log_softmax(-1)
        return product(words, self.shares(words.dtype)).log_softmax(-1)

    def observed(self, output: SlotOutput) -> tuple[Tensor, ...]:
        return (self.word_log_probs(output),)

    @torch.no_grad()
    def calibrate(self, *observed: Float[Tensor, "examples words"]) -> None:
        (found,) = observed
        self.prior.copy_(found.logsumexp(0) - math.log(len(found)))

    def words_by_class(self) -> dict[str, list[str]]:
        """Returns the words of each class, without those that were left out."""
        return {
            name: [one.word for one in self.label_words if one.label == label]
            for label, name in enumerate(self.classes)
        }

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "words", "words": self.words_by_class(), "prefix": self.prefix, "multi": self.multi}

    def extra_repr(self) -> str:
        """Returns what `print` shows of it."""
        return "\n".join(f"{name}: {', '.join(words)}" for name, words in self.words_by_class().items())


def word_verbalizers(verbalizer: Verbalizer) -> list[WordVerbalizer]:
    """Returns a verbalizer, or those in it, that read words."""
    return [module for module in verbalizer.modules() if isinstance(module, WordVerbalizer)]
