"""PromptModel: a backbone, a template and a verbalizer as one classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.delta import Delta
from deltakit.prompting.prediction import Prediction
from deltakit.prompting.template import Example, Filters, Template
from deltakit.prompting.verbalizers.verbalizer import Verbalizer


class PromptModel(nn.Module):
    """Classifies examples by what a backbone predicts in the slots of a template.

    The backbone stays the user's: deltas, freezing and devices are its own, and `parameters()` has those of both. A delta that
    is attached to it keeps template and verbalizer in its files; `PromptModel.from_delta` makes the model from a loaded one.
    With transformers' `Trainer` pass `data_collator=model.collate` and `remove_unused_columns=False`.

    Args:
        backbone: a language model with a head, deltas attached or not.
        template: a template for this backbone.
        verbalizer: a verbalizer with as many slots as the template.

    Raises:
        OptionError: if template, verbalizer and backbone do not fit.
        TargetError: if the backbone has no language-model head.
        StateError: if the template has soft tokens and no attached delta has their vectors.
    """

    @checked
    def __init__(self, backbone: nn.Module, template: Template, verbalizer: Verbalizer) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"] | None = None,
        *,
        slots: Int[Tensor, "batch slots"],
        token_type_ids: Int[Tensor, "batch length"] | None = None,
        decoder_input_ids: Int[Tensor, "batch target"] | None = None,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> dict[str, Tensor]:
        """Returns `logits`, the classes' log-probabilities [batch, classes], and ahead of them the `loss` if there are labels.

        The arguments are what `collate` returns.
        """
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Returns the batch of some examples, as `Template.collate`. Labels may also be the names of classes."""
        raise NotImplementedError

    def predict(self, examples: Any, *, top_k: int = 5, batch_size: int = 32) -> Any:
        """Returns the `Prediction` of an example, or a list of them for a list of examples.

        Args:
            top_k: how many of the words that the backbone predicts in each slot are listed; 0 for none.
            batch_size: how many examples the backbone gets at once.
        """
        raise NotImplementedError

    def calibrate(self, examples: Sequence[Example], *, batch_size: int = 32) -> None:
        """Gives the verbalizer the words' priors: their mean probability on unlabelled or content-free examples.

        Contextual calibration (Zhao et al. 2021): `model.calibrate([{"text": "N/A"}, {"text": ""}])`.
        """
        raise NotImplementedError

    def refine(self, examples: Sequence[Example], *, drop: float = 0.5, batch_size: int = 32) -> None:
        """Drops words of a `KnowledgeableVerbalizer` by what the backbone says about unlabelled examples, and calibrates it."""
        raise NotImplementedError

    def keep_with(self, delta: Delta) -> None:
        """Makes the files of a delta hold template and verbalizer. Those that are attached before training do anyway."""
        raise NotImplementedError

    @classmethod
    def from_delta(cls, delta: Delta, tokenizer: Any, *, filters: Filters | None = None) -> "PromptModel":
        """Returns the model whose template and verbalizer a loaded delta has: `PromptModel.from_delta(dk.load(...), tokenizer)`.

        Raises:
            CheckpointError: if the delta's files have none, or are damaged.
        """
        raise NotImplementedError


class Ensemble(nn.Module):
    """Several prompt models, usually of one backbone, whose class log-probabilities are averaged.

    Args:
        models: the prompt models, with the same classes in the same order.
        weights: of the models; by default all the same.
    """

    def __init__(self, models: Sequence[PromptModel], *, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, members: Sequence[dict[str, Tensor]], labels: Int[Tensor, " batch"] | None = None) -> dict[str, Tensor]:
        """Returns `logits` [batch, classes], the weighted mean of log-probabilities, and ahead of them the `loss`."""
        raise NotImplementedError
