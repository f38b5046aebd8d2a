"""`attach_from_data` attaches methods whose start values and ranks come from the inputs of their targets (EVA)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from deltakit.core import (
    DeltaModule,
    Method,
    Selector,
    Target,
    checked,
    linear_sizes,
    normal_tensors,
    one_value,
    takes,
    without_start_values,
)
from deltakit.delta.attaching import attach
from deltakit.delta.handle import Delta
from deltakit.delta.planning import Plan, original, planned
from deltakit.delta.principal import Components
from deltakit.delta.untrained import start_of
from deltakit.errors import OptionError, StateError, TargetError
from deltakit.injection import observed_inputs

_NOISE = 1e-12
"""The share of the variance below which a direction is one of rounding errors."""


class _Site(NamedTuple):
    """A target, its method, the rank that it has without data, and the largest one that it can have."""

    target: Target
    method: Method
    rank: int
    largest: int


@checked
def attach_from_data(
    backbone: nn.Module,
    *methods: Method,
    run: Callable[[], object],
    rho: float = 2.0,
    name: str | None = None,
    train: Selector | None = None,
    freeze: bool = True,
) -> Delta:
    """Attaches LoRAs that start from data, and returns the delta (EVA).

    `run` calls the model with some batches of the training data. A then gets the directions in which the inputs of each target
    vary most, and targets whose inputs vary in more directions get higher ranks; the sum of the ranks stays. B is zero, so the
    outputs do not change. Scales stay as they are, whatever the rank.

    Paischer et al. 2024, https://arxiv.org/abs/2410.07170, with the inputs centered, as in the authors' code in PEFT. Tokens
    that `attention_mask` hides do not count.

    Args:
        methods: LoRAs, at least one.
        run: called once, without gradients and in evaluation mode. What it returns is ignored.
        rho: a target gets at most this many times its rank, at least 1; with 1 all ranks stay. A target may get the rank 0 and
            is left out then.
        name, train, freeze: as for `attach`.

    Raises:
        OptionError: if a method does not start from data, or `rho` is below 1.
        TargetError: if a target has no input vectors that a hook sees: an embedding, a convolution, a parameter, or a weight
            that is read directly.
        StateError: if a target is not called by `run`, or its inputs vary in too few directions or are not finite.
        DeltaError: as `attach` does.
    """
    if not 1 <= rho < float("inf"):
        raise OptionError(f"attach_from_data(rho={rho}): expected a finite number of at least 1; 2 is usual")
    if not takes(run):
        raise OptionError(
            f"attach_from_data(run={run!r:.80}): expected a function without arguments that calls the model, such as "
            "lambda: [model(**batch) for batch in batches]"
        )
    with without_start_values():
        sites = _sites(planned(backbone, methods, train))
    found = _components(backbone, sites, run, rho)
    ranks = _ranks(sites, found, rho) if rho > 1 else {site.target.path: site.rank for site in sites}
    delta = attach(backbone, *_with_ranks(sites, ranks), name=name, train=train, freeze=freeze)
    with normal_tensors(), torch.no_grad():
        for path, modules in delta.modules.items():
            for module in modules:
                module.start_at(found[path].vectors[: ranks[path]])
    delta._record.start = start_of(delta._attachment)
    return delta


def _sites(plan: Plan) -> list[_Site]:
    found: list[_Site] = []
    for method, built in zip(plan.methods, plan.built, strict=True):
        for path, module in built.items():
            target, options = plan.index.target(path), cast(Any, method)
            if type(module).start_at is DeltaModule.start_at:
                raise OptionError(
                    f"attach_from_data: {method.name} does not start from data; write LoRA(), or use attach()"
                )
            if any(other.target.path == path for other in found):
                raise OptionError(f"attach_from_data: two methods select {path}; leave it out of one with exclude=")
            sizes = linear_sizes(target.module)
            if sizes is None or module.weight_read is not None:
                raise TargetError(
                    f"{target.named}: a start from data needs a linear layer that is called, and this is "
                    f"{'a weight that is read directly' if sizes else type(target.module).__name__}; leave it out with "
                    "exclude=, or use attach()"
                )
            d_out = sizes[1] if target.feature_slice is None else target.feature_slice.size
            found.append(_Site(target, method, one_value(options.r), min(sizes[0], d_out)))
    return found


def _components(
    backbone: nn.Module, sites: Sequence[_Site], run: Callable[[], object], rho: float
) -> dict[str, Components]:
    """Returns the principal components of the inputs of each target."""
    backbone = original(backbone)
    # Between batches some more are kept than are needed, because each batch changes their order.
    found = {site.target.path: Components(2 * round(rho * site.rank) + 8) for site in sites}
    modules = {site.target.path: site.target.module for site in sites}
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        with observed_inputs(backbone, modules, lambda path, x: found[path].add(x)), torch.no_grad():
            run()
    finally:
        for module in training:
            module.training = True
    for site in sites:
        _refuse_too_few(site, found[site.target.path])
    return found


def _refuse_too_few(site: _Site, found: Components) -> None:
    where = f"{site.target.named}: attach_from_data"
    if not found.count:
        raise StateError(
            f"{where}: run() did not call it; call the model itself in run(), or leave the target out with exclude="
        )
    if not math.isfinite(found.total):
        raise StateError(f"{where}: its inputs are infinite or not a number; leave out the batch that makes them so")
    varying = sum(share > _NOISE for share in found.shares())
    if varying < site.rank:
        raise StateError(
            f"{where}: its {found.count} inputs vary in {varying} directions, and its rank is {site.rank}; run more batches, "
            "or use a lower rank"
        )


def _ranks(sites: Sequence[_Site], found: Mapping[str, Components], rho: float) -> dict[str, int]:
    """Returns the ranks: of all components of all targets, those that explain most of the variance of their target."""
    shares = []
    for site in sites:
        most = min(round(rho * site.rank), site.largest)
        shares += [(share, site.target.path) for share in found[site.target.path].shares()[:most] if share > _NOISE]
    shares.sort(key=lambda pair: pair[0], reverse=True)
    taken = [path for _, path in shares[: sum(site.rank for site in sites)]]
    return {site.target.path: taken.count(site.target.path) for site in sites}


def _with_ranks(sites: Sequence[_Site], ranks: Mapping[str, int]) -> list[Method]:
    paths: dict[tuple[int, int], list[str]] = {}
    methods = {id(site.method): site.method for site in sites}
    for site in sites:
        paths.setdefault((id(site.method), ranks[site.target.path]), []).append(site.target.path or "^")
    return [
        replace(methods[method].with_rank(rank), at=tuple(own), of=None, exclude=None)
        for (method, rank), own in paths.items()
        if rank
    ]
