"""Words for classes."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import checked, wide
from deltakit.errors import OptionError, warn
from deltakit.openprompt.prompt_base import Verbalizer
from deltakit.prompting import word_ids

MultiToken = Literal["first", "mean", "max"]


class ManualVerbalizer(Verbalizer):
    """Words stand for classes: a class's score is the mean of its words' log-probabilities among all label words.

    `label_words_ids` [classes, words, tokens] are the ids of the words, padded with 0. Words that are split are allowed, as in
    OpenPrompt. Unlike there, a warning says where classes cannot be told apart, or the tokenizer does not know a word.

    Args:
        tokenizer, classes, num_classes: as of `Verbalizer`.
        label_words: for each class a word or a list of words, or a dict of them by the names of classes. A word that starts
            with "<!>" gets no prefix.
        prefix: what stands before a word.
        multi_token_handler: which logits a split word has: those of its first token, their mean, or the largest.
        post_log_softmax: False leaves out the softmax over label words.
    """

    label_words_ids: nn.Parameter
    words_ids_mask: nn.Parameter
    label_words_mask: nn.Parameter

    @checked
    def __init__(
        self,
        tokenizer: Any,
        classes: Sequence[Any] | None = None,
        num_classes: int | None = None,
        label_words: Any = None,
        prefix: str = " ",
        multi_token_handler: MultiToken = "first",
        post_log_softmax: bool = True,
    ) -> None:
        super().__init__(tokenizer, classes, num_classes)
        self.prefix, self.multi_token_handler, self.post_log_softmax = prefix, multi_token_handler, post_log_softmax
        self._calibrate_logits: Tensor | None = None
        self.label_words = label_words

    def on_label_words_set(self) -> None:
        ids = [[self._ids(word) for word in own] for own in self.label_words]
        self._warn_of_same(ids)
        words, tokens = max(map(len, ids)), max(len(one) for own in ids for one in own)
        table, mask = (torch.zeros(len(ids), words, tokens, dtype=torch.long) for _ in range(2))
        for label, own in enumerate(ids):
            for place, one in enumerate(own):
                table[label, place, : len(one)] = torch.tensor(one)
                mask[label, place, : len(one)] = 1
        # Parameters of integers, as in OpenPrompt, so that its state dicts fit.
        self.label_words_ids = nn.Parameter(table, requires_grad=False)
        self.words_ids_mask = nn.Parameter(mask, requires_grad=False)
        self.label_words_mask = nn.Parameter(mask.amax(-1), requires_grad=False)

    def _ids(self, word: str) -> list[int]:
        prefix = "" if word.startswith("<!>") else self.prefix
        word = word.removeprefix("<!>")
        try:
            return list(word_ids(self.tokenizer, word, prefix, type(self).__name__, starts_text=not prefix))
        except OptionError as error:
            warn(str(error))
            found = self.tokenizer.encode(prefix + word, add_special_tokens=False)
            return found or [getattr(self.tokenizer, "unk_token_id", None) or 0]

    def _warn_of_same(self, ids: list[list[list[int]]]) -> None:
        read = 1 if self.multi_token_handler == "first" else None
        seen: dict[tuple[int, ...], tuple[int, str]] = {}
        for label, own in enumerate(self.label_words):
            for word, one in zip(own, ids[label], strict=True):
                other, same = seen.setdefault(tuple(one[:read]), (label, word))
                if other != label:
                    first = " (their first tokens)" if read else ""
                    warn(
                        f"{type(self).__name__}: the words {same!r} of class {other} and {word!r} of class {label} have the "
                        f"same ids{first}, so the classes look alike; choose other words, or multi_token_handler='mean'"
                    )

    def project(self, logits: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "batch classes words"]:
        """Returns the logits of the label words; -inf where a class has fewer words than another."""
        found = wide(logits)[:, self.label_words_ids]
        there = self.words_ids_mask.to(found)
        if self.multi_token_handler == "first":
            words = found[..., 0]
        elif self.multi_token_handler == "mean":
            words = (found * there).sum(-1) / there.sum(-1).clamp(min=1)
        else:
            words = found.masked_fill(there == 0, -torch.inf).amax(-1)
        return words.masked_fill(self.label_words_mask == 0, -torch.inf)

    def process_logits(self, logits: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "batch classes"]:
        words = self.project(logits)
        if self.post_log_softmax:
            words = _normalized(words)
            if self._calibrate_logits is not None:
                prior = _normalized(self.project(self._calibrate_logits[None]))
                words = _normalized((words - prior).masked_fill(self.label_words_mask == 0, -torch.inf))
        # Words that are not there have no share, and 0 * -inf is no number.
        return (words.masked_fill(self.label_words_mask == 0, 0) * self.shares()).sum(-1)

    def shares(self) -> Float[Tensor, "classes words"]:
        """Returns how much each word counts in its class; the sum of a row is 1."""
        return self.label_words_mask / self.label_words_mask.sum(-1, keepdim=True)

    def register_calibrate_logits(self, logits: Float[Tensor, " vocabulary"]) -> None:
        """Takes the mean logits of `openprompt.utils.calibrate.calibrate`: words are divided by their probabilities there."""
        self._calibrate_logits = logits.detach()


def _normalized(words: Float[Tensor, "batch classes words"]) -> Float[Tensor, "batch classes words"]:
    return words.flatten(1).log_softmax(-1).view(words.shape)
