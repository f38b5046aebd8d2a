"""Products with a sparse update of a weight: y + s S x, where S has n entries.

A product with the dense S takes as long as the layer's own. With 2 % of the entries, as SHiRA with r=8 has them in 768 x 768,
the sparse one takes a sixth of it on a CPU, and so does the gradient of the entries (measured, 512 tokens). The gradient of x
needs no product of its own: the layer's is taken with the sum of both matrices.
"""

import sys
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltakit.core import DeltaModule
from deltakit.ops.low_rank import hooked_everywhere, only_plain
from deltakit.ops.module_copy import is_hooked
from deltakit.ops.recompute import Layer

_is_batched = torch._C._functorch.is_legacy_batchedtensor

_WORKS = torch.backends.mkl.is_available() and sys.platform == "linux"
"""torch's products with sparse matrices need MKL, and are built with it on Linux."""

_DENSEST = 8
"""One entry in so many: with more, the dense product is as fast."""

_TOKENS = 128
"""Tokens of one sparse product. Its result is transposed, and stays in the cache for the sum: half the time (measured)."""


class Entries(NamedTuple):
    """Where the entries of a matrix are, in the order of its rows: row r has those from `starts[r]` to `starts[r + 1]`."""

    starts: Int[Tensor, " rows"]
    places: Int[Tensor, "2 n"]
    shape: tuple[int, int]

    def matrix(self, values: Float[Tensor, " n"]) -> Tensor:
        """Returns the sparse matrix with these values."""
        _silence()
        return torch.sparse_csr_tensor(self.starts, self.places[1], values, self.shape, check_invariants=False)


def sparse_entries(
    delta: DeltaModule,
    values: Float[Tensor, "*stack n"],
    places: Int[Tensor, "2 n"],
    shape: tuple[int, int],
    x: Float[Tensor, "*batch d_in"],
) -> Entries | None:
    """Returns the entries for `add_sparse`; None if the dense product is to be taken.

    That is on other devices than a CPU, in 16 bits, with many entries, and if the places are not in the order of their rows.
    It is also for delta modules with hooks, by which engines put the values in, and which only a call of the module runs.
    """
    rows, columns = shape
    if (
        values.ndim != 1
        or any(one.device.type != "cpu" for one in (values, places, x))
        or values.dtype is not x.dtype
        or x.dtype not in (torch.float32, torch.float64)
        or places.dtype is not torch.int32
        or not 0 < len(values) * _DENSEST <= rows * columns
        or x.numel() == 0
        or not _WORKS
        or is_hooked(delta)
        or hooked_everywhere()
    ):
        return None
    # Memory outside of the matrix would be read for a place outside of it. The dense formula raises an error for one.
    first, last = places[1].aminmax()
    starts = torch.searchsorted(places[0], torch.arange(rows + 1, dtype=torch.int32), out_int32=True)
    inside = starts[0] == 0 and starts[-1] == len(values) and first >= 0 and last < columns
    in_order = bool((places[0, 1:] >= places[0, :-1]).all())
    return Entries(starts, places, shape) if inside and in_order else None


def add_sparse(
    layer: Layer, x: Float[Tensor, "*batch d_in"], values: Float[Tensor, " n"], entries: Entries
) -> Float[Tensor, "*batch d_out"]:
    """Returns the layer's output plus the scaled product of x with the sparse matrix, and changes the output in place.

    One autograd node serves both, as in `add_linear_with`. It saves x and the values.
    """
    if not torch.is_grad_enabled():
        return _added(layer, x, values, entries)
    out: Tensor = _Sparse.apply(x, values, entries.places, layer, entries)
    return out


def _added(layer: Layer, x: Tensor, values: Tensor, entries: Entries) -> Tensor:
    matrix = entries.matrix(values * layer.scale)
    parts = layer.y.view(-1, layer.y.shape[-1]).split(_TOKENS), x.reshape(-1, x.shape[-1]).split(_TOKENS)
    for y_part, x_part in zip(*parts, strict=True):
        y_part += (matrix @ x_part.mT).mT
    return layer.y


class _Sparse(torch.autograd.Function):
    """The sum, with its gradients written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor, layer: Layer, entries: Entries) -> Tensor:
        ctx.scale, ctx.flipped, ctx.entries = layer.scale, layer.flipped, entries
        # Saved places tell when they have been changed since.
        ctx.save_for_backward(x, values, places, layer.weight if ctx.needs_input_grad[0] else None)
        return _added(layer, x, values, entries)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.autocast(g.device.type, enabled=False):
            x, values, places, weight = ctx.saved_tensors
            needs_x, needs_values, *_ = ctx.needs_input_grad
            gx = g @ _whole(weight, values, places.long(), ctx) if needs_x else None
            found = _of_values(g, x, values, places.long(), ctx) * ctx.scale if needs_values else None
            return gx, found, None, None, None


def _whole(weight: Tensor, values: Tensor, places: Int[Tensor, "2 n"], ctx: Any) -> Float[Tensor, "d_out d_in"]:
    """Returns the sum of the layer's weight and the update."""
    # As the weight is stored, so that it is copied once.
    rows, columns = places.flip(0) if ctx.flipped else places
    whole = (
        weight.reshape(-1).index_add(0, rows * weight.shape[1] + columns, values, alpha=ctx.scale).view(weight.shape)
    )
    return whole.mT if ctx.flipped else whole


def _of_values(g: Tensor, x: Tensor, values: Tensor, places: Int[Tensor, "2 n"], ctx: Any) -> Float[Tensor, " n"]:
    """Returns the gradient of the unscaled entries: of entry (r, c) the sum of g_r x_c over all tokens."""
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    # Sparse matrices have no second derivatives, and no batches of gradients (`is_grads_batched`, `vmap`).
    if torch.is_grad_enabled() or _is_batched(g) or only_plain(g, x, values):
        return (g.mT @ x)[places[0], places[1]]
    found = ctx.entries.matrix(torch.zeros_like(values))
    for g_part, x_part in zip(g.split(_TOKENS), x.split(_TOKENS), strict=True):
        found = torch.sparse.sampled_addmm(found, g_part.mT, x_part)
    total: Tensor = found.values()
    return total


@cache
def _silence() -> None:
    """torch warns once in a process that sparse matrices of this form are in beta. Here, they are tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
