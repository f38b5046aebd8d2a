"""RuleVerbalizer (PTR): a class is a conjunction of words in several slots.  Han et al. 2021, https://arxiv.org/abs/2105.11259."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltakit.core import checked
from deltakit.prompting.verbalizers.verbalizer import Verbalizer
from deltakit.prompting.verbalizers.words import Multi


class RuleVerbalizer(Verbalizer):
    """log p(class) = sum_j log p_j(word of the class in slot j), normalized. In each slot, the words that rules have there compete.

    Args:
        tokenizer: the backbone's tokenizer.
        rules: for each class its word in each slot, such as `{"parent": ("person", "parent", "person")}`.
        prefix, multi: as of `WordVerbalizer`; "score" and "drop" are not served.

    Raises:
        OptionError: if rules have different numbers of words, two classes have the same words, or a word does not fit.
    """

    @checked
    def __init__(
        self, tokenizer: Any, rules: Mapping[str, Sequence[str]], *, prefix: str = " ", multi: Multi = "refuse"
    ) -> None:
        raise NotImplementedError
