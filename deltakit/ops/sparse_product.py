"""Products with a sparse update of a weight: y + s S x, where S has n entries.

A product with the dense S takes as long as the layer's own. With 2 % of the entries, as SHiRA with r=8 has them in 768 x 768,
the sparse one takes a sixth of it on a CPU, and so does the gradient of the entries (measured, 512 tokens). The gradient of x
needs no product of its own: the layer's is taken with the sum of both matrices.
"""

import sys
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltakit.core import DeltaModule
from deltakit.errors import StateError
from deltakit.ops.fast_paths import hooked_everywhere, only_plain
from deltakit.ops.module_copy import is_hooked
from deltakit.ops.recompute import Layer

_is_batched = torch._C._functorch.is_legacy_batchedtensor

_WORKS = torch.backends.mkl.is_available() and sys.platform == "linux"
"""torch's products with sparse matrices need MKL, and are built with it on Linux."""

_DENSEST = 8
"""One entry in so many at most. With one in 12 the sparse product takes 0.4 of the time (measured, 512 tokens)."""

_TOKENS = 128
"""Tokens of one sparse product. Its result is transposed, and stays in the cache for the sum: 0.5 to 0.7 of the time."""


class Entries(NamedTuple):
    """Where the entries of a matrix are, in the order of its rows: row r has those from `starts[r]` to `starts[r + 1]`."""

    starts: Int[Tensor, " rows_and_1"]
    places: Int[Tensor, "2 n"]
    shape: tuple[int, int]

    def matrix(self, values: Float[Tensor, " n"]) -> Tensor:
        """Returns the sparse matrix with these values."""
        parts = self.starts, self.places[1], values, self.shape
        return torch.sparse_csr_tensor(*parts, device=values.device, check_invariants=False)


def _silence() -> None:
    """torch warns once in a process that sparse matrices of this form are in beta; here they are tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        starts, places = (torch.zeros(*shape, dtype=torch.int32, device="cpu") for shape in ((2,), (2, 0)))
        Entries(starts, places, (1, 0)).matrix(torch.zeros(0, device="cpu"))


if _WORKS:
    # While this is imported, because filters of warnings are those of all threads.
    _silence()


def sparse_entries(
    delta: DeltaModule,
    values: Float[Tensor, " n"],
    places: Int[Tensor, "2 n"],
    shape: tuple[int, int],
    x: Float[Tensor, "*batch d_in"],
) -> Entries | None:
    """Returns the entries for `add_sparse`; None if the dense product is to be taken.

    The sparse one is for float32 and float64 on a CPU, few entries in the order of their rows, and torch with MKL. Delta
    modules with hooks have the dense one: by hooks, engines put in the values, and only a call of the module runs them.

    Raises:
        StateError: if a place is outside of the matrix.
    """
    if (
        any(one.device.type != "cpu" for one in (values, places, x))
        or values.dtype is not x.dtype
        or x.dtype not in (torch.float32, torch.float64)
        or len(values) != places.shape[1]
        or not 0 < len(values) * _DENSEST <= shape[0] * shape[1]
        or x.numel() == 0
        or not _WORKS
        or is_hooked(delta)
        or hooked_everywhere()
    ):
        return None
    entries = _entries_at(places, shape)
    if entries is None and not are_inside(places, shape):
        raise StateError(
            f"{delta.word()} has places outside of a weight of {shape[0]} to {shape[1]}; load its state again"
        )
    return entries


def are_inside(places: Int[Tensor, "2 n"], shape: tuple[int, int]) -> bool:
    """Returns whether all places, of which there is at least one, are in a matrix of this shape."""
    ends = [one.aminmax() for one in places]
    return all(bool(first >= 0) and bool(last < size) for (first, last), size in zip(ends, shape, strict=True))


def _entries_at(places: Int[Tensor, "2 n"], shape: tuple[int, int]) -> Entries | None:
    """Returns the entries at these places; None if a sparse matrix cannot have them as they are."""
    # torch reads the places as if they were contiguous, and wherever they point to: also outside of the matrix.
    if places.dtype is not torch.int32 or not places.is_contiguous() or places.is_inference():
        return None
    if not are_inside(places, shape) or not bool((places[0, 1:] >= places[0, :-1]).all()):
        return None
    rows = torch.arange(shape[0] + 1, dtype=torch.int32, device=places.device)
    return Entries(torch.searchsorted(places[0], rows, out_int32=True), places, shape)


def add_sparse(
    layer: Layer, x: Float[Tensor, "*batch d_in"], values: Float[Tensor, " n"], entries: Entries
) -> Float[Tensor, "*batch d_out"]:
    """Returns the layer's output plus the scaled product of x with the sparse matrix, and changes the output in place.

    One autograd node serves both, as in `add_linear_with`. Beyond the model's own tensors it saves x alone.
    """
    if not torch.is_grad_enabled():
        return _added(layer, x, values, entries)
    out: Tensor = _Sparse.apply(x, values, layer, entries)
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
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: Layer, entries: Entries) -> Tensor:
        ctx.scale, ctx.flipped, ctx.shape = layer.scale, layer.flipped, entries.shape
        # Saved places tell when they have been changed since. Where they do not, as after `.data`, the gradients are those at
        # the new ones.
        ctx.save_for_backward(x, values, entries.places, layer.weight if ctx.needs_input_grad[0] else None)
        return _added(layer, x, values, entries)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.autocast(g.device.type, enabled=False):
            x, values, places, weight = ctx.saved_tensors
            needs_x, needs_values, *_ = ctx.needs_input_grad
            gx = g @ _whole(weight, values, places.long(), ctx) if needs_x else None
            found = _of_values(g, x, places, ctx.shape) * ctx.scale if needs_values else None
            return gx, found, None, None


def _whole(weight: Tensor, values: Tensor, places: Int[Tensor, "2 n"], ctx: Any) -> Float[Tensor, "d_out d_in"]:
    """Returns the sum of the layer's weight and the update."""
    # As the weight is stored, so that it is copied once.
    rows, columns = places.flip(0) if ctx.flipped else places
    whole = (
        weight.reshape(-1).index_add(0, rows * weight.shape[1] + columns, values, alpha=ctx.scale).view(weight.shape)
    )
    return whole.mT if ctx.flipped else whole


def _of_values(g: Tensor, x: Tensor, places: Int[Tensor, "2 n"], shape: tuple[int, int]) -> Float[Tensor, " n"]:
    """Returns the gradient of the unscaled entries: of entry (r, c) the sum of g_r x_c over all tokens."""
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    # Sparse matrices have no batches of gradients (`is_grads_batched`, `vmap`).
    dense = _is_batched(g) or only_plain(g, x, x)
    entries = None if dense else _entries_at(places, shape)
    if entries is None:
        rows, columns = places.long()
        return (g.mT @ x)[rows, columns]
    found = entries.matrix(x.new_zeros(places.shape[1]))
    for g_part, x_part in zip(g.split(_TOKENS), x.split(_TOKENS), strict=True):
        found = torch.sparse.sampled_addmm(found, g_part.mT, x_part)
    total: Tensor = found.values()
    return total
