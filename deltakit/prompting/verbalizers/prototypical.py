"""PrototypicalVerbalizer (ProtoVerb): a trained prototype for each class.  Cui et al. 2022, https://arxiv.org/abs/2203.09770."""

from collections.abc import Sequence

from torch import nn

from deltakit.core import checked
from deltakit.prompting.verbalizers.verbalizer import Verbalizer


class PrototypicalVerbalizer(Verbalizer):
    """log p(class) = log_softmax over c of cos(W h, prototype_c). Its loss is contrastive, between instances and prototypes.

    Args:
        backbone: the language model, for the size of its head.
        classes: the names of the classes.
        size: the number of features of prototypes, at least 1.

    Raises:
        OptionError: if there are no classes, one is there twice, or `size` is below 1.
        TargetError: if the backbone has no language-model head.
    """

    @checked
    def __init__(self, backbone: nn.Module, classes: Sequence[str], *, size: int = 64) -> None:
        raise NotImplementedError
