"""Trained vectors for classes (WARP, Hambardzumyan et al. 2021, https://arxiv.org/abs/2101.00121)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltakit.core import checked
from deltakit.openprompt.prompt_base import Verbalizer
from deltakit.prompting import SlotOutput
from deltakit.prompting import SoftVerbalizer as SoftVectors


class SoftVerbalizer(Verbalizer):
    """A trained vector for each class in the place of words: `deltakit.prompting.SoftVerbalizer`.

    It reads the input of the backbone's output embedding. OpenPrompt copies the last module of the model instead, and loses
    T5's scale.

    Args:
        tokenizer, classes, num_classes: as of `Verbalizer`.
        model: the backbone.
        label_words: the words whose embeddings the vectors start from; without them they start as random numbers.
        prefix: what stands before a word.
    """

    @checked
    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module,
        classes: Sequence[Any] | None = None,
        num_classes: int | None = None,
        label_words: Any = None,
        prefix: str = " ",
        multi_token_handler: str = "first",
    ) -> None:
        super().__init__(tokenizer, classes, num_classes)
        self.multi_token_handler = multi_token_handler
        self.label_words = label_words
        names = class_names(self)
        given = names if label_words is None else dict(zip(names, self.label_words, strict=True))
        self.head = SoftVectors(model, given, tokenizer=tokenizer, prefix=prefix)

    @property
    def group_parameters_1(self) -> list[nn.Parameter]:
        """The parameters that are no class vectors: none."""
        return []

    @property
    def group_parameters_2(self) -> list[nn.Parameter]:
        """The class vectors."""
        return list(self.head.parameters())

    def process_outputs(self, output: SlotOutput) -> Tensor:
        return self.head(output)


def class_names(verbalizer: Verbalizer) -> list[str]:
    """Returns the names of its classes; their numbers where they have none."""
    return [str(name) for name in verbalizer.classes or range(verbalizer.num_classes or 0)]
