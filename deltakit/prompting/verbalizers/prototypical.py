"""PrototypicalVerbalizer (ProtoVerb): a trained prototype for each class.

Cui et al. 2022, https://arxiv.org/abs/2203.09770, section 3.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltakit.core import checked, wide
from deltakit.errors import OptionError
from deltakit.prompting.backbone_facts import head_of
from deltakit.prompting.verbalizers.soft import head_weight
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer, product


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
        super().__init__(classes)
        if size < 1:
            raise OptionError(f"PrototypicalVerbalizer(size={size}): expected at least 1; 64 is usual")
        self.size = size
        weight = head_weight(head_of(backbone))
        self.projection = nn.Parameter(weight.new_empty(size, weight.shape[1]))
        self.prototypes = nn.Parameter(weight.new_empty(len(self.classes), size))
        nn.init.xavier_uniform_(self.projection)
        nn.init.xavier_uniform_(self.prototypes)

    def projected(self, output: SlotOutput) -> Float[Tensor, "batch size"]:
        """Returns W h of each example, with length 1."""
        return F.normalize(product(output.hidden[:, 0], self.projection), dim=-1)

    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        return self._scores(self.projected(output)).log_softmax(-1)

    def _scores(self, instances: Float[Tensor, "batch size"]) -> Float[Tensor, "batch classes"]:
        return product(instances, F.normalize(wide(self.prototypes), dim=-1))

    def loss(self, output: SlotOutput, labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Returns the sum of two contrastive losses.

        Between instances: the mean over pairs (i, j) of one class of -log(exp s_ij / (exp s_ij + sum_n exp s_in)), n of other
        classes. Between instances and prototypes: the mean over instances i of the same with the prototype of its class in
        the place of j, and the instances of other classes around that prototype.
        """
        instances = self.projected(output)
        same = labels[:, None] == labels
        between = _contrast(product(instances, instances), same)
        # Rows are the prototypes of the instances' classes: s_ij = cos(prototype of i, instance j).
        to_prototypes = self._scores(instances)[:, labels].T
        around = _contrast(to_prototypes, same)
        return between[same].mean() + around.diagonal().mean()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "prototypical", "classes": list(self.classes), "size": self.size}


def _contrast(scores: Float[Tensor, "batch batch"], same: Tensor) -> Float[Tensor, "batch batch"]:
    """Returns -log(exp s_ij / (exp s_ij + sum_n exp s_in)) for all i and j, with n over those that are not the same as i."""
    others = scores.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    return torch.logaddexp(scores, others) - scores
