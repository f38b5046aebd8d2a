"""Ensemble: several templates for one task."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.prompting.backbone_names import BackboneNames
from deltakit.prompting.collating import labels_of
from deltakit.prompting.prediction import Prediction
from deltakit.prompting.prompt_model import PromptModel
from deltakit.prompting.template import Example
from deltakit.prompting.tied_tensors import name_tied_once


class Ensemble(BackboneNames, nn.Module):
    """Several prompt models, usually of one backbone, whose class log-probabilities are averaged.

    log p(class) = log_softmax of sum_i w_i log p_i(class). `collate` makes a batch for each of them, so the `Trainer` trains
    them together.

    Args:
        models: the prompt models, with the same classes in the same order.
        weights: of the models, above 0, such as their accuracies on held-out examples; by default all the same.

    Raises:
        OptionError: if there are no models, their classes differ, or the weights do not fit.
    """

    weights: Tensor

    @checked
    def __init__(self, models: Sequence[PromptModel], *, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not models:
            raise OptionError("Ensemble: expected at least one PromptModel, found none")
        other = next((one for one in models if one.verbalizer.classes != models[0].verbalizer.classes), None)
        if other is not None:
            raise OptionError(
                f"Ensemble: the classes of its models differ: {models[0].verbalizer.classes} and {other.verbalizer.classes}; "
                "write the same ones in the same order"
            )
        given = [1.0] * len(models) if weights is None else list(weights)
        if len(given) != len(models) or not all(0 < one < float("inf") for one in given):
            raise OptionError(f"Ensemble(weights={given}): expected {len(models)} numbers above 0, one for each model")
        self.members = nn.ModuleList(models)
        self.classes = models[0].verbalizer.classes
        name_tied_once(self)
        total = sum(given)
        self.register_buffer("weights", torch.tensor([one / total for one in given]))

    def forward(
        self, members: Sequence[dict[str, Tensor]], labels: Int[Tensor, " batch"] | None = None
    ) -> dict[str, Tensor]:
        """Returns `logits` [batch, classes], log-probabilities, and ahead of them the `loss` if there are labels."""
        logits = self._joined([model(**batch)["logits"] for model, batch in zip(self.members, members, strict=True)])
        return {"logits": logits} if labels is None else {"loss": F.nll_loss(logits, labels), "logits": logits}

    def backbones(self) -> Sequence[nn.Module]:
        """Returns the backbones of its models, each once."""
        return list({id(model.backbone): model.backbone for model in self._models()}.values())

    @checked
    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Returns the batches of some examples, one for each model, and their labels, as a `data_collator` does.

        Raises:
            OptionError: as `Template.collate`.
        """
        labels = labels_of(examples, self.classes)
        plain = [{name: value for name, value in example.items() if name != "label"} for example in examples]
        found = {"members": [model.collate(plain) for model in self._models()]}
        return found if labels is None else {**found, "labels": labels}

    @checked
    @torch.no_grad()
    def predict(self, examples: Any, *, top_k: int = 0, batch_size: int = 32) -> Any:
        """Returns the `Prediction` of an example, or a list of them; the words are those of all models, one after the other.

        Raises:
            OptionError: as `PromptModel.predict`.
        """
        single = isinstance(examples, Mapping)
        listed = [examples] if single else examples
        each = [model._predicted(listed, top_k, batch_size) for model in self._models()]
        rows = self._joined([own for own, _ in each]).exp().tolist()
        found = [
            Prediction(dict(zip(self.classes, row, strict=True)), [slot for _, words in each for slot in words[place]])
            for place, row in enumerate(rows)
        ]
        return found[0] if single else found

    def _joined(self, each: Sequence[Float[Tensor, "batch classes"]]) -> Float[Tensor, "batch classes"]:
        found: Float[Tensor, "members batch classes"] = torch.stack(list(each))
        return (found * self.weights.to(found)[:, None, None]).sum(0).log_softmax(-1)

    def _models(self) -> list[PromptModel]:
        return [model for model in self.members if isinstance(model, PromptModel)]
