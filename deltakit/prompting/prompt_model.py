"""PromptModel: a backbone, a template and a verbalizer as one classifier."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.delta import Delta
from deltakit.errors import CheckpointError, OptionError
from deltakit.prompting.backbone_facts import embedding_of
from deltakit.prompting.backbone_names import BackboneNames
from deltakit.prompting.evaluating import evaluating
from deltakit.prompting.fitting import check_fit, check_soft, shorten_to_fit
from deltakit.prompting.keeping import exchange, keep_with_all
from deltakit.prompting.prediction import Prediction, likely_words
from deltakit.prompting.prompt_parts import NAME, PromptParts, read_parts
from deltakit.prompting.slot_calls import output_of
from deltakit.prompting.template import Example, Filters, Template
from deltakit.prompting.tied_tensors import name_tied_once
from deltakit.prompting.verbalizers.knowledgeable import KnowledgeableVerbalizer
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer


class PromptModel(BackboneNames, nn.Module):
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

    backbone: nn.Module
    verbalizer: Verbalizer

    @checked
    def __init__(self, backbone: nn.Module, template: Template, verbalizer: Verbalizer) -> None:
        super().__init__()
        check_fit(backbone, template, verbalizer)
        check_soft(backbone, template)
        self.backbone, self.template, self.verbalizer = backbone, template, verbalizer
        self._parts, self._kept = PromptParts(template, verbalizer), False
        # On the backbone's device: the verbalizer reads its logits.
        verbalizer.to(embedding_of(backbone).weight.device)
        keep_with_all(backbone, self._parts)
        name_tied_once(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        kept = state["_parts"]
        if not isinstance(kept, PromptParts):
            # Of a pickle.
            self._parts = PromptParts(self.template, self.verbalizer, fitted=True)
            exchange(self.backbone, kept, self._parts)

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
        if self.training and torch.is_grad_enabled() and not self._kept:
            self._keep_as_fitted()
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "decoder_input_ids": decoder_input_ids,
        }
        output = self.slot_output(call, slots)
        if labels is None:
            return {"logits": self.verbalizer(output)}
        loss, scores = self.verbalizer.loss_and_scores(output, labels)
        return {"loss": loss, "logits": scores}

    def backbones(self) -> Sequence[nn.Module]:
        """Returns the backbone in a list."""
        return [self.backbone]

    def slot_output(self, call: Mapping[str, Any], slots: Int[Tensor, "batch slots"]) -> SlotOutput:
        """Returns what the backbone computes in the slots of a batch.

        Args:
            call: the backbone's arguments; what `collate` returns without `slots` and `labels`.
            slots: the positions of the slots in its logits.

        Raises:
            StateError: if the template has soft tokens, and no attached delta has their vectors.
        """
        check_soft(self.backbone, self.template)
        return output_of(self.backbone, self.verbalizer, call, slots, mask=self.template.mask_id)

    @checked
    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Returns the batch of some examples, as `Template.collate`. Labels may also be the names of classes.

        Raises:
            OptionError: as `Template.collate`.
        """
        return self.template.collate(examples, classes=self.verbalizer.classes)

    @checked
    def predict(self, examples: Any, *, top_k: int = 5, batch_size: int = 32) -> Any:
        """Returns the `Prediction` of an example, or a list of them for a list of examples.

        Args:
            examples: a dict, or a sequence of dicts. Their labels are not needed.
            top_k: how many of the words that the backbone predicts in each slot are listed; 0 for none.
            batch_size: how many examples the backbone gets at once.

        Raises:
            OptionError: as `collate`, and if `top_k` or `batch_size` is out of its range.
        """
        single = isinstance(examples, Mapping)
        rows, words = self._predicted([examples] if single else examples, top_k, batch_size)
        found = [
            Prediction(dict(zip(self.verbalizer.classes, row, strict=True)), own)
            for row, own in zip(rows.exp().tolist(), words, strict=True)
        ]
        return found[0] if single else found

    @torch.no_grad()
    def _predicted(
        self, examples: Any, top_k: int, batch_size: int
    ) -> tuple[Float[Tensor, "examples classes"], list[list[list[tuple[str, float]]]]]:
        """Returns the log-probabilities of the classes, and for each example and slot the most likely words.

        Raises:
            OptionError: as `predict` does.
        """
        if top_k < 0:
            raise OptionError(f"predict(top_k={top_k}): expected at least 0")
        rows = [torch.empty(0, len(self.verbalizer.classes))]
        words: list[list[list[tuple[str, float]]]] = []
        for output in self._outputs(examples, batch_size, "predict"):
            words += likely_words(output.logits, top_k, self.template.tokenizer)
            rows.append(self.verbalizer(output).cpu())
        return torch.cat(rows), words

    @checked
    def calibrate(self, examples: Any, *, batch_size: int = 32) -> None:
        """Gives the verbalizer the words' priors: their mean probability on unlabelled or content-free examples.

        Contextual calibration (Zhao et al. 2021): `model.calibrate([{"text": "N/A"}, {"text": ""}])`.

        Args:
            examples: a sequence of dicts, such as a data set. Their labels are not needed.
            batch_size: how many examples the backbone gets at once.

        Raises:
            OptionError: if the verbalizer has no words, or there are no examples.
        """
        self.verbalizer.calibrate(*self._observed(examples, batch_size, "calibrate"))
        self._keep_as_fitted()

    @checked
    def refine(self, examples: Any, *, drop: float = 0.5, batch_size: int = 32) -> None:
        """Drops words of a `KnowledgeableVerbalizer` by what the backbone says about unlabelled examples, and calibrates it.

        Args:
            examples: some two hundred examples in a sequence of dicts, such as a data set. Their labels are not needed.
            drop: the share of words with the lowest mean probability that is dropped.

        Raises:
            OptionError: if the verbalizer is another one, there are no examples, or `drop` is not in [0, 1).
        """
        if not isinstance(self.verbalizer, KnowledgeableVerbalizer):
            raise OptionError(
                f"refine: a {type(self.verbalizer).__name__} drops no words; use a KnowledgeableVerbalizer, or calibrate()"
            )
        self.verbalizer.refine(*self._observed(examples, batch_size, "refine"), drop=drop)
        self._keep_as_fitted()

    @torch.no_grad()
    def _observed(self, examples: Any, batch_size: int, where: str) -> list[Tensor]:
        _check_sequence(examples, where)
        if not len(examples):
            raise OptionError(f"{where}: expected at least one example, found none")
        batches = [self.verbalizer.observed(output) for output in self._outputs(examples, batch_size, where)]
        return [torch.cat(found) for found in zip(*batches, strict=True)]

    def _outputs(self, examples: Any, batch_size: int, where: str) -> Iterator[SlotOutput]:
        """Yields what the backbone computes for batches of examples, without gradients and dropout."""
        if batch_size < 1:
            raise OptionError(f"{where}(batch_size={batch_size}): expected at least 1")
        _check_sequence(examples, where)
        device = embedding_of(self.backbone).weight.device
        for start in range(0, len(examples), batch_size):
            chosen = [examples[place] for place in range(start, min(start + batch_size, len(examples)))]
            for one in chosen:
                if not isinstance(one, Mapping):
                    raise OptionError(f"{where}: expected examples as dictionaries, found {type(one).__name__}")
            unlabelled = [{name: value for name, value in one.items() if name != "label"} for one in chosen]
            batch = {name: tensor.to(device) for name, tensor in self.template.collate(unlabelled).items()}
            slots = batch.pop("slots")
            with torch.no_grad(), evaluating(self):
                output = self.slot_output(batch, slots)
            yield output

    @checked
    def keep_with(self, delta: Delta) -> None:
        """Makes the files of a delta hold template and verbalizer.

        Deltas that are attached and active when the model is made, or at its first training step, need no such call. With
        several models on one backbone, a delta keeps those of the model whose training began last (calibrating, refining and
        loading count as training), else of the one that was made last.
        """
        delta._record.extras[NAME] = self._parts

    def _keep_as_fitted(self) -> None:
        self._parts.fitted = True
        self._kept = keep_with_all(self.backbone, self._parts)

    @classmethod
    @checked
    def from_delta(cls, delta: Delta, tokenizer: Any, *, filters: Filters | None = None) -> "PromptModel":
        """Returns the model whose template and verbalizer a loaded delta has.

        `PromptModel.from_delta(dk.load("my-delta", backbone), tokenizer)`

        Args:
            tokenizer: the backbone's tokenizer.
            filters: the functions that the template names. Files do not hold functions.

        Raises:
            CheckpointError: if the delta's files have none, or are damaged.
            StateError: if the template has soft tokens, and the delta is not attached.
        """
        where = f"delta {delta.name!r}"
        found = delta._record.extras.get(NAME)
        if found is None:
            raise CheckpointError(
                f"{where}: its files have no template and no verbalizer; save it from a backbone with a PromptModel, or make "
                "the PromptModel of your own"
            )
        parts = read_parts(found.data(), found.tensors(), delta.backbone, tokenizer, filters, where)
        shorten_to_fit(delta.backbone, parts.template, parts.verbalizer)
        model = cls(delta.backbone, parts.template, parts.verbalizer)
        model._parts.fitted = True
        model.keep_with(delta)
        return model


def _check_sequence(examples: Any, where: str) -> None:
    if (
        isinstance(examples, str | Tensor | Mapping)
        or not hasattr(examples, "__getitem__")
        or not hasattr(examples, "__len__")
    ):
        what = "an example or a list of examples" if where == "predict" else "a list of examples"
        raise OptionError(f"{where}: expected {what}, found {type(examples).__name__}")
