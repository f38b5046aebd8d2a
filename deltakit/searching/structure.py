"""Candidates and structures: which methods at which targets, and which of them fit into a budget."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from deltakit.core import Method, Selector
from deltakit.delta import plan
from deltakit.errors import OptionError
from deltakit.searching.gated import check_candidate


class Candidate(NamedTuple):
    """One method at one target, and the number of parameters that it trains there."""

    method: Method
    path: str
    size: int


@dataclass(frozen=True)
class Structure:
    """What a search has found: attach it by `attach(model, *structure.methods)`, and train it.

    `methods`: with the paths of their targets. `num_parameters`: what they train, at most the budget. `probabilities`: for
    each pair of a method's name and a path, the probability in [0, 1] that the search gave it.
    """

    methods: tuple[Method, ...]
    num_parameters: int
    probabilities: dict[tuple[str, str], float]

    def __repr__(self) -> str:
        lines = [f"structure of {self.num_parameters:,} parameters"]
        for method in self.methods:
            lines.append(f"  {method.name}")
            lines += [f"      {path}  p={self.probabilities[method.name, path]:.2f}" for path in method.at or ()]
        return "\n".join(lines)


def candidates_of(backbone: nn.Module, methods: Sequence[Method], train: Selector | None) -> list[Candidate]:
    """Returns every target of every method.

    Raises:
        DeltaError: as `plan` does.
        TargetError, OptionError: if a method cannot be a candidate.
    """
    found = plan(backbone, *methods, train=train)
    candidates = []
    for method, built in zip(found.methods, found.built, strict=True):
        for path, module in built.items():
            check_candidate(method, path, module)
            size = sum(parameter.numel() for _, parameter, _ in module.trained_parameters())
            candidates.append(Candidate(method, path, size))
    return candidates


def check_budget(candidates: Sequence[Candidate], budget: int) -> None:
    """Refuses a budget into which nothing fits.

    Raises:
        OptionError: if it is below the number of parameters of every candidate.
    """
    least = min(candidate.size for candidate in candidates)
    if budget < least:
        raise OptionError(
            f"search(budget={budget}): expected a number of parameters of at least {least}, that of the smallest candidate; "
            "raise it, or give candidates of a lower rank"
        )


def fitting(candidates: Sequence[Candidate], order: Iterable[int], budget: int) -> list[Candidate]:
    """Returns the candidates, taken in this order, that fit into what the earlier ones leave of the budget."""
    found = []
    for number in order:
        if candidates[number].size <= budget:
            found.append(candidates[number])
            budget -= candidates[number].size
    return found


def methods_at(chosen: Sequence[Candidate], order: Sequence[Candidate]) -> tuple[Method, ...]:
    """Returns the methods of the chosen candidates, each with the paths of its targets, in the order of all candidates."""
    methods = list(dict.fromkeys(map(id, (candidate.method for candidate in order))))
    found = []
    for identity in methods:
        own = [candidate for candidate in order if id(candidate.method) == identity and candidate in chosen]
        if own:
            paths = tuple(candidate.path or "^" for candidate in own)
            found.append(replace(own[0].method, at=paths, of=None, exclude=None))
    return tuple(found)
