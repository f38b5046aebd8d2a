"""Batched low-rank products for mixed-adapter batches: all LoRAs on a layer run as two batched matrix products.

The factors of each example's delta are gathered once per batch. With 2 to 16 deltas this took 1.04 to 1.07 times as long as
the bare model on 32 tokens per example, whatever their number; PEFT's loop took 1.32 to 1.38. A loop over deltas and
`torch._grouped_mm` were slower with each further delta (measured on a CPU).

Where many examples share a delta and have a token each (decoding), gathering reads the same factors again and again. There one
product with the factors of all deltas, masked for each example, is faster, although it computes what the mask removes.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from deltakit.core import DeltaModule, MixedBatch

# Measured on two cores with 768 features and ranks of 8. The masked form wins with up to three tokens and at least eight
# examples per delta: 16 examples with 2 deltas take 1.15 instead of 1.25 times as long as the bare model, and 64 examples with
# 1 delta 1.08 instead of 1.19.
FEW_TOKENS = 3
MANY_EXAMPLES = 8
_VERSION = attrgetter("_version")


class Masked(NamedTuple):
    """The factors of all deltas side by side, and which of the ranks each example uses."""

    low: Float[Tensor, "ranks d_in"]
    high: Float[Tensor, "ranks d_out"]
    mask: Bool[Tensor, "examples ranks"]


class Gathered(NamedTuple):
    """The factors of each example's delta: `low` is A, `high` is B transposed."""

    low: Float[Tensor, "examples r d_in"]
    high: Float[Tensor, "examples r d_out"]


class SharedWork(NamedTuple):
    """The work that the first delta module on a target does for all: their modules by delta, and each example's delta.

    `places` holds for each example the index of its delta in `modules`, or -1 for none. In compiled code it is a tensor, so
    that other examples need no other graph. `tables` are the modules' own tables of parameters, if they have all that the
    modules compute with.
    """

    modules: list[list[Any]]
    places: list[int] | Int64[Tensor, " examples"]
    tables: list[dict[str, Tensor]] | None = None

    def parameters(self) -> list[Tensor]:
        """Returns all parameters that the modules compute with."""
        # In C code, because this runs in each call for all deltas on the target.
        if self.tables is not None:
            return list(chain.from_iterable(map(dict.values, self.tables)))
        return [parameter for own in self.modules for module in own for parameter in module.parameters_read()]


def shared_work(delta: DeltaModule, target: nn.Module, batch: MixedBatch) -> SharedWork | None:
    """Returns the shared work at a target; None if each delta module must run on its own.

    They run on their own if modules of other classes are there, because the order of the deltas matters then, or if one has
    dropout.
    """
    if torch.compiler.is_compiling():
        # Neither `names` nor what is kept of them: compiled code would be for these names alone.
        owners, here, alike = _modules_at(delta, target)
        if not alike:
            return None
        numbers = [owners.index(name) if name in owners else -1 for name in batch.known]
        # The last number is that of examples without a delta, whose owner is -1.
        return SharedWork(here, torch.tensor([*numbers, -1], device=batch.owners.device)[batch.owners])
    # The same for all calls in a `rows` block, where names and modules cannot change. `train()` changes which modules drop.
    key = (target, "work", delta.training)
    if key not in batch.kept:
        owners, here, alike = _modules_at(delta, target)
        places = [owners.index(name) if name in owners else -1 for name in batch.names]
        batch.kept[key] = SharedWork(here, places, _tables(here)) if alike else None
        if alike and here:
            batch.first[target, delta.training] = here[0][0]
    work: SharedWork | None = batch.kept[key]
    return work


def _modules_at(delta: DeltaModule, target: nn.Module) -> tuple[list[str], list[list[Any]], bool]:
    """Returns the names of the deltas at a target, their modules, and whether all can share their work."""
    # Compiled code has all that may take part in any batch, since `takes_part` reads the names of one.
    any_batch = torch.compiler.is_compiling()
    children = [m for m in list(target._modules.values()) if isinstance(m, DeltaModule)]
    modules: list[Any] = [m for m in children if m.live and (any_batch or m.takes_part)]
    owners = list(dict.fromkeys(m.record.name for m in modules))
    here = [[m for m in modules if m.record.name == name] for name in owners]
    return owners, here, all(type(m) is type(delta) and not m.drops for m in modules)


def add_per_example(
    delta: DeltaModule,
    work: SharedWork,
    target: nn.Module,
    x: Float[Tensor, "*batch d_in"],
    y: Float[Tensor, "*batch d_out"],
    batch: MixedBatch,
    *,
    in_place: bool,
) -> Float[Tensor, "*batch d_out"] | None:
    """Returns y with each example's product added, for all deltas on the target; None if `delta` is not the first of them.

    With beam search y has several consecutive rows per example.

    Args:
        in_place: whether y may be changed.

    Raises:
        StateError: if the number of rows is not a multiple of the number of examples.
    """
    if not work.modules or work.modules[0][0] is not delta:
        return None
    # Raises if the rows of y do not fit the names.
    batch.times(y, target)
    examples = batch.owners.shape[0]
    # Where the factors are made anew in each call, gathering is cheaper than checking that they are finite.
    kept = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    few = kept and x.shape[:-1].numel() <= FEW_TOKENS * y.shape[0]
    few = few and MANY_EXAMPLES * len(work.modules) <= examples

    def make() -> Gathered | Masked:
        pairs = [[module.whole_factors() for module in own] for own in work.modules]
        both = [(torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], 1)) for own in pairs]
        masked = masked_factors(both, work.places, x) if few and isinstance(work.places, list) else None
        return gathered_factors(both, work.places, x) if masked is None else masked

    factors: Gathered | Masked = kept_or_made(batch, (target, few, x.dtype, x.device), work, make)
    if isinstance(factors, Masked):
        return _add_masked(x, y, factors, examples, in_place=in_place)
    rows = x.reshape(examples, -1, x.shape[-1])
    out = y.reshape(examples, -1, y.shape[-1])
    # Not x A^T: with 64 examples of one token that takes 2.3 times as long (measured on a CPU).
    h = torch.bmm(factors.low, rows.mT).mT
    if _casts(x, y):
        return (out + torch.bmm(h, factors.high).to(y.dtype)).view(y.shape)
    added = out.baddbmm_(h, factors.high) if in_place else torch.baddbmm(out, h, factors.high)
    return added.view(y.shape)


def _add_masked(x: Tensor, y: Tensor, factors: Masked, examples: int, *, in_place: bool) -> Tensor:
    times = x.shape[:-1].numel() // examples
    mask = factors.mask if times == 1 else factors.mask.repeat_interleave(times, 0)
    flat = y.reshape(-1, y.shape[-1])
    h = (x.reshape(-1, x.shape[-1]) @ factors.low.mT).masked_fill_(~mask, 0)
    if _casts(x, y):
        return (flat + (h @ factors.high).to(y.dtype)).view(y.shape)
    return (flat.addmm_(h, factors.high) if in_place else torch.addmm(flat, h, factors.high)).view(y.shape)


def _casts(x: Tensor, y: Tensor) -> bool:
    """Whether the product has another dtype than the output: the output keeps its own."""
    # Compiled code cannot ask for autocast in this way.
    return x.dtype is not y.dtype or (not torch.compiler.is_compiling() and torch._C._is_any_autocast_enabled())


def masked_factors(
    factors: Sequence[tuple[Float[Tensor, "_ d_in"], Float[Tensor, "d_out _"]]],
    places: Sequence[int],
    x: Float[Tensor, "*batch d_in"],
) -> Masked | None:
    """Returns the factors of all deltas side by side; None if one of them is not finite.

    Args:
        factors: A [r, d_in] and B [d_out, r] of each delta.
        places: for each example the index of its delta, or -1 for none.
        x: gives the dtype and the device.
    """
    low = torch.cat([a.to(x.dtype) for a, _ in factors])
    high = torch.cat([b.to(x.dtype).mT for _, b in factors])
    # Zero times infinity is not a number: one delta's overflow would enter the examples of all.
    if not (low.isfinite().all() and high.isfinite().all()):
        return None
    owner = torch.tensor([number for number, (a, _) in enumerate(factors) for _ in range(a.shape[0])], device=x.device)
    return Masked(low, high, torch.tensor(places, device=x.device)[:, None] == owner)


def gathered_factors(
    factors: Sequence[tuple[Float[Tensor, "_ d_in"], Float[Tensor, "d_out _"]]],
    places: Sequence[int] | Int64[Tensor, " examples"],
    x: Float[Tensor, "*batch d_in"],
) -> Gathered:
    """Returns the factors of each example's delta, stacked.

    Args:
        factors: A [r, d_in] and B [d_out, r] of each delta.
        places: for each example the index of its delta, or -1 for none.
        x: gives the dtype and the device.
    """
    # Smaller ranks are padded with zeros, and examples without a delta get zeros, so that one product serves them all.
    rank = max(a.shape[0] for a, _ in factors)
    low = torch.stack([F.pad(a.to(x.dtype), (0, 0, 0, rank - a.shape[0])) for a, _ in factors])
    high = torch.stack([F.pad(b.to(x.dtype).mT, (0, 0, 0, rank - b.shape[1])) for _, b in factors])
    index = places.to(x.device) if isinstance(places, Tensor) else torch.tensor(places, device=x.device)
    # Not `-1 in places`: behind a graph break dynamo takes that for false (measured on torch 2.13).
    if isinstance(places, Tensor) or min(places) < 0:
        low, high = (torch.cat([part, torch.zeros_like(part[:1])]) for part in (low, high))
        index = index.where(index >= 0, len(factors))
    return Gathered(low.index_select(0, index), high.index_select(0, index))


def kept_or_made(batch: MixedBatch, key: Any, work: SharedWork, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns, and caches it until a parameter of the modules changes or is replaced."""
    # With gradients nothing is cached, because the graph goes through the gathering. While compiling, versions cannot be
    # read.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make()
    parameters = work.parameters()
    # Inference tensors have no versions.
    if parameters[0].is_inference():
        return make()
    versions = [*map(_VERSION, parameters)]
    found = batch.kept.get(key)
    # The tensors themselves are kept, because another tensor may get the id of one that is gone.
    if found is None or found[1] != versions or not all(map(is_, found[0], parameters)):
        found = batch.kept[key] = (parameters, versions, make())
    return found[2]


def _tables(modules: Sequence[Sequence[Any]]) -> list[dict[str, Tensor]] | None:
    """Returns the tables of parameters of delta modules; None if they compute with others too, or a table has gaps."""
    flat = [module for own in modules for module in own]
    tables = [module._parameters for module in flat]
    alone = all(not module._modules and "_shared" not in module.__dict__ for module in flat)
    return tables if alone and not any(value is None for table in tables for value in table.values()) else None
