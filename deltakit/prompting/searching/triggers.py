"""AutoPrompt: words of a template that gradients point to.

Shin et al. 2020, https://arxiv.org/abs/2010.15980, section 2.2.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deltakit.core import checked, wide
from deltakit.errors import OptionError
from deltakit.injection import captured_output
from deltakit.prompting.backbone_facts import embedding_of
from deltakit.prompting.evaluating import evaluating
from deltakit.prompting.fitting import check_fit
from deltakit.prompting.searching.scoring import Batch, ScoredTemplate, batches_of, check_examples, scored
from deltakit.prompting.searching.vocabulary import WordTokens
from deltakit.prompting.searching.writing import soft_places, with_text, written
from deltakit.prompting.slot_calls import output_of
from deltakit.prompting.soft_tokens import numbered
from deltakit.prompting.template import Example, Template
from deltakit.prompting.verbalizers.verbalizer import Verbalizer

Propose = Literal["gradient", "random"]
_MOST_FORWARDS = 10_000_000


@dataclass(frozen=True)
class TriggerSearch:
    """What a search for triggers has found.

    `templates`: the template with the words that were found and the one it started from, the lowest loss first. `forwards`:
    how often the backbone was called. `losses`: the loss of the best words after each step, on the batch of that step.
    """

    templates: tuple[ScoredTemplate, ...]
    forwards: int
    losses: tuple[float, ...]

    @property
    def best(self) -> ScoredTemplate:
        """The template with the lowest loss."""
        return self.templates[0]


@checked
def search_triggers(
    backbone: nn.Module,
    template: Template,
    verbalizer: Verbalizer,
    examples: Sequence[Example],
    *,
    forwards: int = 500,
    candidates: int = 10,
    propose: Propose = "gradient",
    batch_size: int = 32,
    seed: int = 0,
) -> TriggerSearch:
    """Searches for words in the places of a template's soft pieces that make the backbone predict the labels (AutoPrompt).

    In each step one place is drawn. By the first-order estimate e_w * (gradient of the loss at the place), the words are
    chosen that lower the loss of a batch most; each is tried on this batch, and the best is kept if it is better. No parameter
    is trained or changed. The result is the text of a template: `Template(found.best.text, tokenizer, backbone)`.

    Args:
        template: its soft pieces are the places: `{"soft": "it was"}` starts as these words, others as random ones.
        verbalizer: its own words are no candidates.
        examples: dicts with the template's fields and a "label".
        forwards: the most calls of the backbone, at most ten million. Each step takes one for the gradient and one for each
            candidate.
        candidates: how many words are tried in a step.
        propose: "gradient", or "random" for a search with random candidates and the same budget, to compare with.
        batch_size: how many examples a step sees.
        seed: the seed of the places, the batches, and of random words.

    Raises:
        OptionError: if the template has no soft piece, there are no labelled examples, the budget does not last for one step,
            or something does not fit the backbone.
    """
    check_examples(examples, batch_size, "search_triggers")
    places = soft_places(template, "search_triggers")
    check_fit(backbone, template, verbalizer)
    if candidates < 1:
        raise OptionError(f"search_triggers(candidates={candidates}): expected at least 1")
    if forwards > _MOST_FORWARDS:
        raise OptionError(f"search_triggers(forwards={forwards}): expected at most {_MOST_FORWARDS:,}")
    # The templates at the start and at the end are scored on all examples.
    scoring = 2 * -(-len(examples) // batch_size)
    steps = (forwards - scoring) // (candidates + 1)
    if steps < 1:
        raise OptionError(
            f"search_triggers(forwards={forwards}): {scoring} calls score the result on {len(examples)} examples, and a step "
            f"takes {candidates + 1}; pass at least {scoring + candidates + 1}"
        )
    search = _Search(
        backbone,
        template,
        verbalizer,
        WordTokens(template.tokenizer, embedding_of(backbone).num_embeddings, verbalizer.token_ids),
        random.Random(seed),
    )
    start = search.start()
    trigger, losses = list(start), []
    with evaluating(backbone), evaluating(verbalizer):
        for batch in search.batches(examples, batch_size, steps):
            losses.append(search.step(trigger, batch, candidates, propose))
    texts = dict.fromkeys(search.text(words, places) for words in (trigger, start))
    found = [scored(backbone, with_text(template, text, backbone), verbalizer, examples, batch_size) for text in texts]
    used = steps * (candidates + 1) + len(found) * scoring // 2
    return TriggerSearch(tuple(sorted(found, key=lambda one: one.loss)), used, tuple(losses))


@dataclass(frozen=True)
class _Search:
    backbone: nn.Module
    template: Template
    verbalizer: Verbalizer
    words: WordTokens
    chance: random.Random

    def start(self) -> list[int]:
        starts = numbered(self.template.pieces, self.template.tokenizer).starts
        return [self.random_word() if one is None else one for one in starts]

    def random_word(self) -> int:
        order = self.chance.sample(range(self.words.size), self.words.size)
        found = next(self.words.among(order), None)
        if found is None:
            raise OptionError(
                "search_triggers: no token of the tokenizer is a word of its own, so no words can be tried"
            )
        return found

    def batches(self, examples: Sequence[Example], size: int, steps: int) -> Iterator[Batch]:
        """Yields a random batch for each step; with few examples the same one, which is tokenized once."""
        few = len(examples) <= size
        whole = next(batches_of(self.backbone, self.template, self.verbalizer.classes, examples, size)) if few else None
        for _ in range(steps):
            own = [] if few else self.chance.sample(list(examples), size)
            yield whole or next(batches_of(self.backbone, self.template, self.verbalizer.classes, own, size))

    def text(self, trigger: Sequence[int], places: Sequence[int]) -> str:
        numbers: Mapping[int, Sequence[int]] = numbered(self.template.pieces, self.template.tokenizer).numbers
        decode = self.template.tokenizer.decode
        return written(
            self.template.pieces,
            {place: " ".join(decode([trigger[n]]).strip() for n in numbers[place]) for place in places},
        )

    def step(self, trigger: list[int], batch: Batch, candidates: int, propose: Propose) -> float:
        """Tries words in one place of the trigger, keeps the best, and returns its loss."""
        place = self.chance.randrange(len(trigger))
        loss, order = self.ranked(trigger, batch, place)
        if propose == "random":
            order = self.chance.sample(range(self.words.size), self.words.size)
        tried = []
        for token in self.words.among(order):
            if token != trigger[place]:
                tried.append(token)
            if len(tried) == candidates:
                break
        for token in tried:
            other = [*trigger[:place], token, *trigger[place + 1 :]]
            with torch.no_grad():
                found = float(self.loss(other, batch))
            if found < loss:
                loss, trigger[place] = found, token
        return loss

    def ranked(self, trigger: Sequence[int], batch: Batch, place: int) -> tuple[float, list[int]]:
        """Returns the loss, and all tokens in the order of their estimated losses in one place, the lowest first."""
        table = embedding_of(self.backbone)
        ids = self.filled(trigger, batch)
        holders = [m for m in self.backbone.modules() if isinstance(m, nn.Embedding) and m.weight is table.weight]
        with torch.enable_grad(), captured_output(holders, ids) as seen:
            loss = self.loss(trigger, batch)
        if seen.output is None:
            raise OptionError(
                f"search_triggers: {type(self.backbone).__name__} does not call its input embedding with the ids, so there is "
                "no gradient; pass propose='random'"
            )
        (gradient,) = torch.autograd.grad(loss, seen.output)
        there = batch["input_ids"] == self.template.first_soft + place
        slope = wide(table.weight.detach()) @ wide(gradient[there]).sum(0)
        return float(loss.detach()), slope.argsort(stable=True).tolist()

    def filled(self, trigger: Sequence[int], batch: Batch) -> Tensor:
        """Returns the ids of a batch with the trigger's words in the places of soft tokens."""
        ids, first = batch["input_ids"], self.template.first_soft
        words = torch.tensor(trigger, device=ids.device)
        return torch.where(ids >= first, words[(ids - first).clamp(min=0)], ids)

    def loss(self, trigger: Sequence[int], batch: Batch) -> Tensor:
        call = {name: tensor for name, tensor in batch.items() if name not in ("labels", "slots")}
        call["input_ids"] = self.filled(trigger, batch)
        output = output_of(self.backbone, self.verbalizer, call, batch["slots"], mask=self.template.mask_id)
        return self.verbalizer.loss(output, batch["labels"].to(output.logits.device))
