"""Many words for each class (KPT, Hu et al. 2022, https://arxiv.org/abs/2108.02035)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.openprompt.prompts.manual_verbalizer import ManualVerbalizer, MultiToken


class KnowledgeableVerbalizer(ManualVerbalizer):
    """Many words for each class, with trained weights `label_words_weights` [classes, words].

    Words of several classes, and those that the tokenizer does not know, are left out. `register_calibrate_logits` drops words
    that are rare in the slot. The first word of a class always stays: OpenPrompt fails where a class loses all of its words.

    Args:
        tokenizer, classes, prefix, multi_token_handler, num_classes, label_words, post_log_softmax: as of `ManualVerbalizer`.
        max_token_split: words of more tokens are left out; -1 for none.
        verbalizer_lr: as of OpenPrompt; nothing reads it.
        candidate_frac: the share of the vocabulary whose words are rare.
        pred_temp: a factor of the weights in evaluation.
    """

    @checked
    def __init__(
        self,
        tokenizer: Any = None,
        classes: Sequence[Any] | None = None,
        prefix: str = " ",
        multi_token_handler: MultiToken = "first",
        max_token_split: int = -1,
        verbalizer_lr: float = 5e-2,
        candidate_frac: float = 0.5,
        pred_temp: float = 1.0,
        num_classes: int | None = None,
        label_words: Any = None,
        post_log_softmax: bool = True,
    ) -> None:
        if not 0 <= candidate_frac < 1:
            raise OptionError(
                f"KnowledgeableVerbalizer(candidate_frac={candidate_frac}): expected at least 0 and below 1"
            )
        self.max_token_split, self.candidate_frac, self.pred_temp = max_token_split, candidate_frac, pred_temp
        self.verbalizer_lr = verbalizer_lr
        super().__init__(tokenizer, classes, num_classes, label_words, prefix, multi_token_handler, post_log_softmax)

    def on_label_words_set(self) -> None:
        words = self.label_words
        counts: dict[str, int] = {}
        for word in (word for own in words for word in dict.fromkeys(own)):
            counts[word] = counts.get(word, 0) + 1
        self._label_words = [
            [
                word
                for place, word in enumerate(dict.fromkeys(own))
                if place == 0 or (counts[word] == 1 and self._fits(word))
            ]
            for own in words
        ]
        super().on_label_words_set()
        self.label_words_weights = nn.Parameter(torch.zeros(self.label_words_mask.shape))

    def _fits(self, word: str) -> bool:
        ids = self.tokenizer.encode(self.prefix + word, add_special_tokens=False)
        known = ids and getattr(self.tokenizer, "unk_token_id", None) not in ids
        return bool(known) and (self.max_token_split <= 0 or len(ids) <= self.max_token_split)

    def shares(self) -> Float[Tensor, "classes words"]:
        weights = self.label_words_weights * (1 if self.training else self.pred_temp)
        return weights.masked_fill(self.label_words_mask == 0, -torch.inf).softmax(-1)

    def register_calibrate_logits(self, logits: Float[Tensor, " vocabulary"]) -> None:
        super().register_calibrate_logits(logits)
        rare = torch.zeros_like(logits, dtype=torch.bool)
        rare[logits.argsort()[: int(self.candidate_frac * len(logits))]] = True
        dropped = (rare[self.label_words_ids] & (self.words_ids_mask == 1)).any(-1)
        dropped[:, 0] = False
        self.label_words_mask.masked_fill_(dropped, 0)
