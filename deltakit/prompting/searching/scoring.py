"""Scores templates on labelled examples. All searches are compared by these scores, and so are templates written by hand."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.prompting.backbone_facts import embedding_of
from deltakit.prompting.evaluating import evaluating
from deltakit.prompting.fitting import check_fit, check_soft
from deltakit.prompting.slot_calls import output_of
from deltakit.prompting.template import Example, Template
from deltakit.prompting.verbalizers.verbalizer import Verbalizer

Batch = dict[str, Tensor]


class ScoredTemplate(NamedTuple):
    """The text of a template, its mean loss, and the share of examples in [0, 1] whose class it predicts."""

    text: str
    loss: float
    accuracy: float


@checked
def score_templates(
    backbone: nn.Module,
    templates: Sequence[Template],
    verbalizer: Verbalizer,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
) -> list[ScoredTemplate]:
    """Returns templates with their scores on labelled examples, the lowest loss first. Nothing is trained or changed.

    Each template takes one forward a batch. Score what a search has found on other examples than it was found with.

    Args:
        templates: templates for this backbone.
        examples: dicts with the templates' fields and a "label", an index or the name of a class.
        batch_size: how many examples the backbone gets at once.

    Raises:
        OptionError: if there are no examples, or they, a template and the verbalizer do not fit.
        StateError: if a template has soft tokens whose vectors no attached delta has.
    """
    check_examples(examples, batch_size, "score_templates")
    for template in templates:
        check_fit(backbone, template, verbalizer)
        check_soft(backbone, template)
    found = [scored(backbone, template, verbalizer, examples, batch_size) for template in templates]
    return sorted(found, key=lambda one: one.loss)


@torch.no_grad()
def scored(
    backbone: nn.Module, template: Template, verbalizer: Verbalizer, examples: Sequence[Example], batch_size: int
) -> ScoredTemplate:
    """Returns one template with its scores."""
    loss, right = 0.0, 0
    with evaluating(backbone), evaluating(verbalizer):
        for batch in batches_of(backbone, template, verbalizer.classes, examples, batch_size):
            labels, slots = batch.pop("labels"), batch.pop("slots")
            output = output_of(backbone, verbalizer, batch, slots, mask=template.mask_id)
            labels = labels.to(output.logits.device)
            loss += len(labels) * float(verbalizer.loss(output, labels))
            right += int((verbalizer(output).argmax(-1) == labels).sum())
    return ScoredTemplate(template.text, loss / len(examples), right / len(examples))


def batches_of(
    backbone: nn.Module, template: Template, classes: Sequence[str], examples: Sequence[Example], size: int
) -> Iterator[Batch]:
    """Yields what `Template.collate` returns, on the backbone's device."""
    device = embedding_of(backbone).weight.device
    for start in range(0, len(examples), size):
        batch = template.collate(examples[start : start + size], classes=classes)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def check_examples(examples: Sequence[Example], batch_size: int, where: str) -> None:
    """Refuses examples without labels, and no examples.

    Raises:
        OptionError: if there are some.
    """
    if batch_size < 1:
        raise OptionError(f"{where}(batch_size={batch_size}): expected at least 1")
    if not examples:
        raise OptionError(f"{where}: expected at least one example, found none")
    bare = sum(example.get("label") is None for example in examples)
    if bare:
        raise OptionError(f'{where}: {bare} of {len(examples)} examples have no "label"; give each its class')
