"""Many low-rank deltas at one layer, each for its own rows of a batch: their factors side by side, in two products.

A loop over deltas, and a grouped product, cost more with each delta (measured). Two ways do not loop. Each row's own factors
are gathered, for two batched products. Where many rows share a delta and have a token each, that copies and reads the same
factors again and again; there one product with all factors, of which a mask leaves each row its own, is faster though it
computes what is thrown away.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, MixedBatch

# Measured on two cores, 768 features, ranks of 8: gathered factors win from four tokens a row on, and with fewer than eight
# rows a delta. 64 rows with 1, 8 and 64 deltas: 1.19, 1.23 and 1.47 of the bare backbone, and by the mask 1.07, 1.21 and 2.31.
FEW_TOKENS = 3
MANY_ROWS = 8


class Bank(NamedTuple):
    """`low` and `high`: [names, r, d] for each row of the batch; or [deltas * r, d] for all, with the rows' `mask`."""

    low: Float[Tensor, "*names r d_in"]
    high: Float[Tensor, "*names r d_out"]
    mask: Bool[Tensor, "names r"] | None


class Shared(NamedTuple):
    """The delta modules on a target, by delta, of which the very first does the work of all; and each row's place in them."""

    modules: list[list[Any]]
    places: list[int]


def shared_work(delta: DeltaModule, target: nn.Module, batch: MixedBatch) -> Shared | None:
    """The plan for a target; None if others than its own kind stand there: then each works for itself, in its turn."""
    key = (target, "plan")
    if key not in batch.kept:
        modules = [m for m in target._modules.values() if isinstance(m, DeltaModule) and m.live and m.takes_part]
        owners = list(dict.fromkeys(m.record.name for m in modules))
        here = [[m for m in modules if m.record.name == name] for name in owners]
        index = [owners.index(name) if name in owners else -1 for name in batch.names]
        alike = all(type(m) is type(delta) and not (m.dropout and m.training) for m in modules)
        batch.kept[key] = Shared(here, index) if alike else None
        if alike and here:
            batch.first[target] = here[0][0]
    plan: Shared | None = batch.kept[key]
    return plan


def add_by_rows(
    delta: DeltaModule, plan: Shared, target: nn.Module, x: Tensor, y: Tensor, batch: MixedBatch, *, in_place: bool
) -> Tensor | None:
    """y with each row's product added, for all deltas that stand on the target; None for all but the first of them."""
    if not plan.modules or plan.modules[0][0] is not delta:
        return None
    times = batch.times(y, target)
    few = x.shape[:-1].numel() <= FEW_TOKENS * times * len(plan.places)
    few = few and MANY_ROWS * len(plan.modules) <= len(plan.places)
    # Where the bank is made anew in each call, to copy factors is cheaper than to see that they are finite.
    few = few and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    parameters = [m._parameters[name] for own in plan.modules for m in own for name in ("A", "B")]

    def bank() -> Bank:
        pairs = [[m.factors() for m in own] for own in plan.modules]
        both = [(torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], 1)) for own in pairs]
        return bank_of(both, plan.places, x, few=few)

    found = kept_or_made(batch, (target, few, x.dtype, x.device), parameters, bank)
    return add_bank(y, x, found, len(plan.places), in_place=in_place)


def bank_of(factors: Sequence[tuple[Tensor, Tensor]], index: Sequence[int], x: Tensor, *, few: bool) -> Bank:
    """The factors A [r, d_in] and B [d_out, r] of several deltas, for rows that each have the delta `index`; -1 for none."""
    rank = max(a.shape[0] for a, _ in factors)
    low = torch.stack([F.pad(a.to(x.dtype), (0, 0, 0, rank - a.shape[0])) for a, _ in factors])
    high = torch.stack([F.pad(b.to(x.dtype).mT, (0, 0, 0, rank - b.shape[1])) for _, b in factors])
    places = torch.tensor(index, device=x.device)
    if few:
        own = places[:, None] == torch.arange(len(factors), device=x.device)
        # Zero times infinity would bring one delta's overflow into the rows of all.
        if low.isfinite().all() and high.isfinite().all():
            return Bank(low.flatten(0, 1), high.flatten(0, 1), own.repeat_interleave(rank, 1))
    if -1 in index:
        low, high = (torch.cat([part, torch.zeros_like(part[:1])]) for part in (low, high))
        places = places.where(places >= 0, len(factors))
    return Bank(low.index_select(0, places), high.index_select(0, places), None)


def add_bank(y: Tensor, x: Tensor, bank: Bank, names: int, *, in_place: bool) -> Tensor:
    """y with each row's product added. There may be more rows than names, for each name equally many."""
    if bank.mask is not None:
        times = x.shape[:-1].numel() // names
        mask = bank.mask if times == 1 else bank.mask.repeat_interleave(times, 0)
        flat = y.reshape(-1, y.shape[-1])
        h = (x.reshape(-1, x.shape[-1]) @ bank.low.mT).masked_fill_(~mask, 0)
        return (flat.addmm_(h, bank.high) if in_place else torch.addmm(flat, h, bank.high)).view(y.shape)
    rows = x.reshape(names, -1, x.shape[-1])
    out = y.reshape(names, -1, y.shape[-1])
    h = torch.bmm(rows, bank.low.mT)
    return (out.baddbmm_(h, bank.high) if in_place else torch.baddbmm(out, h, bank.high)).view(y.shape)


def kept_or_made(batch: MixedBatch, key: Any, parameters: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """What `make` gives, made again only when a parameter changed; with gradients always, for they go through it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or parameters[0].is_inference():
        return make()
    state = [parameter._version for parameter in parameters]
    found = batch.kept.get(key)
    if found is None or found[0] != state:
        found = batch.kept[key] = (state, make())
    return found[1]
