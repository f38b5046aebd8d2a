"""WordVerbalizer: one or several words stand for each class."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from deltakit.core import checked
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer

Words = Mapping[str, str | Sequence[str]]
Multi = Literal["refuse", "mean", "first", "score", "drop"]


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

    @checked
    def __init__(self, tokenizer: Any, words: Words, *, prefix: str = " ", multi: Multi = "refuse") -> None:
        raise NotImplementedError

    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError
