"""SoftVerbalizer (WARP): a trained vector for each class, in the place of words.  Hambardzumyan et al. 2021, https://arxiv.org/abs/2101.00121."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from deltakit.core import checked
from deltakit.prompting.verbalizers.verbalizer import Verbalizer
from deltakit.prompting.verbalizers.words import Words


class SoftVerbalizer(Verbalizer):
    """log p(class) = log_softmax(h V^T + b): a trained vector V_c for each class, as the head has one for each word.

    Args:
        backbone: the language model, for the size of its head.
        classes: for each class its word or words, whose rows of the head are the start; or only the names of the classes,
            which start as random vectors.
        tokenizer: the backbone's tokenizer; only needed for words.
        prefix: as of `WordVerbalizer`.

    Raises:
        OptionError: if there are words and no tokenizer, or they do not fit.
        TargetError: if the backbone has no language-model head.
    """

    @checked
    def __init__(
        self, backbone: nn.Module, classes: Words | Sequence[str], *, tokenizer: Any = None, prefix: str = " "
    ) -> None:
        raise NotImplementedError
