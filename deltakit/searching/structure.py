"""Candidates and structures: which methods at which targets, and which of them fit into a budget."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from deltakit.core import Method, Selector
from deltakit.delta import plan
from deltakit.errors import OptionError
from deltakit.ops import InputTap
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
    candidates = _candidates(backbone, methods, train)
    for own in by_method(candidates):
        alone = _candidates(backbone, [_method_at(own)], train)
        if sorted(candidate[1:] for candidate in alone) != sorted(candidate[1:] for candidate in own):
            raise OptionError(
                f"search: the targets of {own[0].method.name} work together, so a gate cannot close one alone; leave it "
                "out of the candidates"
            )
    return candidates


def _candidates(backbone: nn.Module, methods: Sequence[Method], train: Selector | None) -> list[Candidate]:
    found = plan(backbone, *methods, train=train)
    candidates = []
    for method, built in zip(found.methods, found.built, strict=True):
        for path, module in built.items():
            # A tap changes nothing, and is attached with the delta modules that it serves.
            if not isinstance(module, InputTap):
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
    kept = [[candidate for candidate in own if candidate in chosen] for own in by_method(order)]
    return tuple(_method_at(own) for own in kept if own)


def by_method(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Returns the candidates of each method, in the order in which the methods come first."""
    found: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(id(candidate.method), []).append(candidate)
    return list(found.values())


def _method_at(own: Sequence[Candidate]) -> Method:
    return replace(own[0].method, at=tuple(candidate.path or "^" for candidate in own), of=None, exclude=None)
