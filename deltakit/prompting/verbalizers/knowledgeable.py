"""KnowledgeableVerbalizer (KPT): many words a class, cleaned by what the backbone says about unlabelled texts.

Hu et al. 2022, https://arxiv.org/abs/2108.02035.
"""

from typing import Any

from deltakit.core import checked
from deltakit.prompting.verbalizers.words import Multi, Words, WordVerbalizer


class KnowledgeableVerbalizer(WordVerbalizer):
    """Many words for each class, such as from a knowledge base. Words that do not serve are dropped by `PromptModel.refine`.

    Args:
        tokenizer, words, prefix, multi: as of `WordVerbalizer`; words of several tokens are dropped by default.
        learn_weights: whether each word has a trained weight: log p(class) is then the mean with weights softmax(weights).

    Raises:
        OptionError: as of `WordVerbalizer`.
    """

    @checked
    def __init__(
        self, tokenizer: Any, words: Words, *, prefix: str = " ", multi: Multi = "drop", learn_weights: bool = True
    ) -> None:
        raise NotImplementedError
