"""`search` trains gates on every candidate position and method, and returns those that are worth the budget."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from deltakit.core import Method, Selector, checked, takes
from deltakit.delta import Delta, attach
from deltakit.errors import OptionError, StateError
from deltakit.searching.gated import Gated
from deltakit.searching.gates import Gates
from deltakit.searching.structure import Candidate, Structure, candidates_of, check_budget, fitting, methods_at

Part = Literal["weights", "gates"]
_PARTS: tuple[Part, ...] = ("weights", "gates")


@checked
def search(
    backbone: nn.Module,
    candidates: Sequence[Method],
    *,
    budget: int,
    train_step: Callable[[Part], Tensor],
    steps: int = 200,
    train: Selector | None = None,
    lr: float = 3e-4,
    gate_lr: float = 0.1,
    beta: float = 1.0,
    max_norm: float = 2.0,
    seed: int = 0,
) -> Structure:
    """Searches for the positions and methods that are worth a budget of parameters (S3Delta).

    Every method at every of its targets is a candidate. While the search runs, all of them are attached, each with a gate. In
    each step their parameters are trained on one batch and the gates on another. Then the candidates with the most open gates
    are taken, as many as fit. The backbone is left as it was: attach the methods that were found, and train them from the
    start on all data.

    Hu et al. 2022, https://arxiv.org/abs/2206.07382. The gates are trained with the first-order gradient: the paper's
    second-order one needs a copy of the model. Compare with random structures of the same budget before you rely on a result.

    Args:
        candidates: methods, with their positions; at least one. Not prefixes and prompts, which have no factor.
        budget: the largest number of parameters of the structure, without those in `train`.
        train_step: returns the loss of the next batch. It is called with "weights" and "gates" in turn; take the batches of
            the two from different halves of the training data.
        steps: the number of steps, at least 1, with two batches each.
        train: selectors of backbone modules that are trained fully during the search, such as "@head".
        lr: the learning rate of the parameters.
        gate_lr: the learning rate of the gates.
        beta: the width of the gates' sigmoid. Smaller values decide sooner.
        max_norm: gradients are clipped to this norm.
        seed: the seed of the gates' samples. The start values of parameters come from torch's own generator.

    Raises:
        OptionError: if an option is out of its range, nothing fits into the budget, or a method cannot be a candidate.
        StateError: if a loss does not depend on the candidates or is not finite, or as `attach` does.
        TargetError: if a candidate patches a weight, or a method cannot be used on a target.
        SelectorError, RoleError: if a selector matches nothing, or a role does not exist.
    """
    positive = {"lr": lr, "gate_lr": gate_lr, "beta": beta, "max_norm": max_norm, "steps": steps}
    for option, value in positive.items():
        if not 0 < value < float("inf"):
            raise OptionError(f"search({option}={value}): expected a positive number")
    if not candidates:
        raise OptionError("search(candidates=[]): expected at least one method, such as [LoRA(r=1), BitFit()]")
    if not 0 <= seed < 2**63:
        raise OptionError(f"search(seed={seed}): expected a seed of at least 0 that 63 bits hold")
    if not takes(train_step, "weights"):
        raise OptionError(
            f"search(train_step={train_step!r:.80}): expected a function that takes 'weights' or 'gates' and returns the loss "
            "of the next batch, such as lambda part: model(**next(batches[part])).loss"
        )
    found = candidates_of(backbone, candidates, train)
    check_budget(found, budget)
    gates = Gates([candidate.size for candidate in found], budget, beta=beta, seed=seed)
    if sum(candidate.size for candidate in found) > budget:
        delta = attach(backbone, *_gated(found, gates), train=train)
        try:
            _train(delta, gates, train_step, steps, (lr, gate_lr), max_norm)
        finally:
            delta.detach()
    p = gates.probabilities().detach()
    chosen = fitting(found, p.argsort(descending=True, stable=True).tolist(), budget)
    return Structure(
        methods_at(chosen, found),
        sum(candidate.size for candidate in chosen),
        {(candidate.method.name, candidate.path): float(value) for candidate, value in zip(found, p, strict=True)},
    )


def _gated(candidates: Sequence[Candidate], gates: Gates) -> list[Gated]:
    numbers: dict[int, dict[str, int]] = {}
    methods: dict[int, Method] = {}
    for number, (method, path, _) in enumerate(candidates):
        methods[id(method)] = method
        numbers.setdefault(id(method), {})[path] = number
    return [
        Gated(inner=method, gates=gates, numbers=numbers[key], at=tuple(path or "^" for path in numbers[key]))
        for key, method in methods.items()
    ]


def _train(
    delta: Delta,
    gates: Gates,
    train_step: Callable[[Part], Tensor],
    steps: int,
    rates: tuple[float, float],
    max_norm: float,
) -> None:
    parameters = list(delta.parameters())
    optimizers = (
        torch.optim.AdamW(parameters, lr=rates[0]),
        torch.optim.AdamW([gates.alpha], lr=rates[1], weight_decay=0.0),
    )
    decays = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps) for optimizer in optimizers]
    for _ in range(steps):
        sample = gates.draw()
        for part, own, optimizer, decay in zip(_PARTS, (parameters, [gates.alpha]), optimizers, decays, strict=True):
            gates.values = sample if part == "gates" else sample.detach()
            _gradients(train_step(part), part, own)
            torch.nn.utils.clip_grad_norm_(own, max_norm)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()


def _gradients(loss: Tensor, part: str, parameters: Sequence[nn.Parameter]) -> None:
    """Computes the gradients of these parameters alone."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.isfinite():
        raise StateError(
            f"search: train_step({part!r}) returned {loss!r:.80}; expected the loss of a batch, a finite tensor of one value"
        )
    if not loss.requires_grad:
        raise StateError(
            f"search: the loss of train_step({part!r}) does not depend on the candidates; call the model that was given to "
            "search, with gradients enabled"
        )
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
