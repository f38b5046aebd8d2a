"""LM-BFF's label words: those that the backbone finds probable in the slot, and that tell the classes apart.

Gao et al. 2021, https://arxiv.org/abs/2012.15723, section 5.1.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import product
from math import prod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.prompting.evaluating import evaluating
from deltakit.prompting.fitting import check_soft
from deltakit.prompting.searching.scoring import batches_of, check_examples
from deltakit.prompting.searching.vocabulary import WordTokens
from deltakit.prompting.slot_calls import call_at
from deltakit.prompting.template import Example, Template

Propose = Literal["probable", "random"]
_AT_ONCE = 500


class ScoredWords(NamedTuple):
    """For each class its word, the mean loss, and the share of examples in [0, 1] whose class they predict."""

    words: dict[str, str]
    loss: float
    accuracy: float


@checked
def search_label_words(
    backbone: nn.Module,
    template: Template,
    classes: Sequence[str],
    examples: Sequence[Example],
    *,
    candidates: int = 20,
    assignments: int = 10_000,
    keep: int = 10,
    propose: Propose = "probable",
    batch_size: int = 32,
    seed: int = 0,
) -> list[ScoredWords]:
    """Returns a word for each class, in several choices: the highest accuracy first, then the lowest loss (LM-BFF).

    For each class the words are candidates that the backbone finds most probable in the slot of its examples. Choices of one
    candidate for each class are scored on the examples: all of them, or a random sample, whose best are then improved one
    class at a time. The backbone is called once for each batch, whatever the number of choices, and is not changed.

    `WordVerbalizer(tokenizer, search_label_words(...)[0].words)`

    Args:
        template: a template with one slot.
        classes: the names of the classes, at least two.
        examples: dicts with the template's fields and a "label"; at least one of each class.
        candidates: how many words are candidates for each class.
        assignments: how many choices are scored at most, before the best are improved.
        keep: how many choices are returned at most.
        propose: "probable", or "random" for random candidates, to compare with.
        batch_size: how many examples the backbone gets at once.
        seed: the seed of samples and of random words.

    Raises:
        OptionError: if the template has several slots, a class has no example, or an option is out of its range.
        StateError: if the template has soft tokens whose vectors no attached delta has.
    """
    check_examples(examples, batch_size, "search_label_words")
    for name, value in (("candidates", candidates), ("assignments", assignments), ("keep", keep)):
        if value < 1:
            raise OptionError(f"search_label_words({name}={value}): expected at least 1")
    if template.num_slots != 1 or len(set(classes)) < 2 or len(set(classes)) < len(classes):
        raise OptionError(
            f"search_label_words: expected a template with one slot and two or more classes, found {template.num_slots} slots "
            f"and {list(classes)!r:.80}"
        )
    check_soft(backbone, template)
    log_probs, labels = _observed(backbone, template, classes, examples, batch_size)
    absent = [name for number, name in enumerate(classes) if number not in labels.tolist()]
    if absent:
        raise OptionError(
            f"search_label_words: the class {absent[0]!r} has no example; give at least one of each class"
        )
    chance, tokens = random.Random(seed), WordTokens(template.tokenizer, log_probs.shape[1])
    columns = [_candidates(log_probs[labels == c], tokens, candidates, propose, chance) for c in range(len(classes))]
    found = _chosen(_Scores(log_probs, labels), columns, assignments, keep, chance)
    return [
        ScoredWords({name: str(tokens.word(one)) for name, one in zip(classes, own, strict=True)}, loss, accuracy)
        for own, loss, accuracy in found
    ]


@torch.no_grad()
def _observed(
    backbone: nn.Module, template: Template, classes: Sequence[str], examples: Sequence[Example], size: int
) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities in the slot [examples, vocabulary], and the labels."""
    found, labels = [], []
    with evaluating(backbone):
        for batch in batches_of(backbone, template, classes, examples, size):
            labels.append(batch.pop("labels"))
            output = call_at(backbone, batch, batch.pop("slots"))
            found.append(output.logits[:, 0].float().log_softmax(-1))
    return torch.cat(found), torch.cat(labels).to(found[0].device)


def _candidates(
    log_probs: Tensor, tokens: WordTokens, count: int, propose: Propose, chance: random.Random
) -> list[int]:
    order = log_probs.sum(0).argsort(descending=True, stable=True).tolist()
    if propose == "random":
        order = chance.sample(range(tokens.size), tokens.size)
    found = [token for token, _ in zip(tokens.among(order), range(count), strict=False)]
    if not found:
        raise OptionError("search_label_words: no token of the tokenizer is a word of its own")
    return found


class _Scores:
    """Loss and accuracy of choices of words, as `WordVerbalizer` has them: the words compete with each other only."""

    def __init__(self, log_probs: Tensor, labels: Tensor) -> None:
        self.log_probs, self.labels = log_probs, labels

    def of(self, choices: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], float, float]]:
        found = []
        for start in range(0, len(choices), _AT_ONCE):
            part = list(choices[start : start + _AT_ONCE])
            words = self.log_probs[:, torch.tensor(part, device=self.log_probs.device)]
            truth = self.labels[:, None].expand(-1, len(part))
            losses = F.cross_entropy(words.transpose(1, 2), truth, reduction="none").mean(0)
            right = (words.argmax(-1) == truth).float().mean(0)
            found += list(zip(part, losses.tolist(), right.tolist(), strict=True))
        return found


def _chosen(
    scores: _Scores, columns: Sequence[Sequence[int]], count: int, keep: int, chance: random.Random
) -> list[tuple[tuple[int, ...], float, float]]:
    """Returns the best choices of one token of each column, all different, with loss and accuracy."""
    every = prod(map(len, columns)) <= count
    drawn = product(*columns) if every else (_drawn(columns, chance) for _ in range(count))
    best = _sorted(scores.of(_of_different(drawn)))[:keep]
    if not best:
        raise OptionError(
            "search_label_words: the candidates of the classes are the same words, so no choice has different ones; raise "
            "candidates="
        )
    for place, column in [] if every else [*enumerate(columns)] * 2:
        others = ((*own[:place], token, *own[place + 1 :]) for own, _, _ in best for token in column)
        best = _sorted(scores.of(_of_different(others)))[:keep]
    return best


def _drawn(columns: Sequence[Sequence[int]], chance: random.Random) -> tuple[int, ...]:
    found: list[int] = []
    for column in columns:
        found.append(chance.choice([token for token in column if token not in found] or column))
    return tuple(found)


def _of_different(choices: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns each choice of different tokens once."""
    return list(dict.fromkeys(own for own in choices if len(set(own)) == len(own)))


def _sorted(found: Sequence[tuple[tuple[int, ...], float, float]]) -> list[tuple[tuple[int, ...], float, float]]:
    return sorted(found, key=lambda one: (-one[2], one[1], one[0]))
