"""SoftVerbalizer (WARP): a trained vector for each class, in the place of words.

Hambardzumyan et al. 2021, https://arxiv.org/abs/2101.00121, section 3.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import checked, gathered
from deltakit.errors import OptionError, TargetError
from deltakit.prompting.backbone_facts import head_of
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer, product
from deltakit.prompting.verbalizers.word_ids import Words, label_words

_DEVIATION = 0.02


class SoftVerbalizer(Verbalizer):
    """log p(class) = log_softmax(V h + b): a trained vector V_c for each class, as the head has one for each word.

    Args:
        backbone: the language model, for its head.
        classes: for each class its word or words, the mean of whose rows in the head is the start; or only the names of the
            classes, which start as random vectors.
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
        super().__init__(list(classes))
        head: Any = head_of(backbone)
        weight = head_weight(head)
        self.vectors = nn.Parameter(weight.new_empty(len(self.classes), weight.shape[1]).normal_(std=_DEVIATION))
        self.bias = nn.Parameter(weight.new_zeros(len(self.classes)))
        if isinstance(classes, Mapping):
            if tokenizer is None:
                raise OptionError(
                    "SoftVerbalizer: words need a tokenizer; pass tokenizer=, or only the names of the classes"
                )
            self._start_at(label_words(tokenizer, classes, prefix, "mean", "SoftVerbalizer"), weight, head.bias)

    @torch.no_grad()
    def _start_at(self, words: Sequence[Any], weight: Tensor, bias: Tensor | None) -> None:
        for label in range(len(self.classes)):
            rows = [[one.ids for one in words if one.label == label]]
            # The mean of means, so that a word of several tokens counts once.
            own = [weight[torch.tensor(ids, device=weight.device)].mean(0) for ids in rows[0]]
            self.vectors[label] = torch.stack(own).mean(0)
            if bias is not None:
                offsets = [bias.detach()[torch.tensor(ids, device=bias.device)].mean() for ids in rows[0]]
                self.bias[label] = torch.stack(offsets).mean()

    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        return product(output.hidden[:, 0], self.vectors, self.bias).log_softmax(-1)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "soft", "classes": list(self.classes)}


def head_weight(head: nn.Module) -> Float[Tensor, "vocabulary d"]:
    """Returns the rows of a language-model head, one for each word.

    Raises:
        TargetError: if they are no matrix of floats, as in a quantized head.
    """
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise TargetError(
            f"SoftVerbalizer: the language-model head is a {type(head).__name__} without a plain weight matrix; keep the head "
            "unquantized (modules_to_not_convert), or use a WordVerbalizer"
        )
    return gathered(weight.detach())
