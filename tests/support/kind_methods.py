"""A small method of each kind of delta module, each with the formula that it stands for.

Their names are in the table of methods only inside `registered`: other tests run over that table.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import deltakit as dk
from deltakit.core import METHODS, DeltaModule, Target
from deltakit.ops import CallContext, InputMap, LowRank, OutputMap, WeightMap, like
from deltakit.ops.seeded import Seeded, normal
from deltakit.ops.sizes import sizes


@contextmanager
def registered(*methods):
    """The methods in the table of methods, inside a `with` block."""
    METHODS.update({method.name: method for method in methods})
    try:
        yield
    finally:
        for method in methods:
            METHODS.pop(method.name, None)


def vector(size, target, start=0.0):
    return nn.Parameter(torch.full((size,), start, **like(target)))


class AffineDelta(OutputMap):
    """y' = w * y + v."""

    tags: ClassVar = {"w": "gain", "v": "shift"}

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.w, self.v = vector(self.size, target, 1.0), vector(self.size, target)

    def forward(self, x, y):
        return y * self.w + self.v

    def linear_update(self, layer):
        gain = self.w - 1
        return gain[:, None] * layer.weight, self.v if layer.bias is None else gain * layer.bias + self.v

    @staticmethod
    def formula(weight, bias, p, x):
        return (x @ weight.T + bias) * p["w"] + p["v"]


class TurnDelta(InputMap):
    """x' = R x."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.turn = nn.Parameter(torch.eye(self.size, **like(target)))

    def into(self, x):
        return x @ self.turn.T

    def linear_update(self, layer):
        return layer.weight @ (self.turn - torch.eye(self.size, **self.kind)).to(layer.weight), None

    @property
    def kind(self):
        return {"dtype": self.turn.dtype, "device": self.turn.device}

    @staticmethod
    def formula(weight, bias, p, x):
        return x @ p["turn"].T @ weight.T + bias


class FrozenFactorsDelta(LowRank):
    """B = diag(b) B_0 diag(d) and A = A_0, with A_0 and B_0 from a seed (VeRA)."""

    tags: ClassVar = {"b": "up", "d": "down"}

    def __init__(self, target: Target, r: int) -> None:
        super().__init__(target, scaling=1.5)
        self.b, self.d = vector(self.d_out, target), vector(r, target, 0.7)

    def factors(self):
        a, b = self.shared.A0[:, : self.d_in], self.shared.B0[: self.d_out]
        return a, self.b[:, None] * b * self.d

    @staticmethod
    def formula(weight, bias, p, x):
        a, b = p["A0"][:, : weight.shape[1]], p["B0"][: weight.shape[0]]
        return x @ weight.T + bias + 1.5 * (p["b"] * ((p["d"] * (x @ a.T)) @ b.T))


class RescaledDelta(WeightMap):
    """W' = W + u v^T * W."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        rows, columns = outer_sizes(self, target)
        self.u, self.v = vector(rows, target), vector(columns, target, 0.7)

    def weight_update(self, weight):
        return self.u[:, None] * self.v * weight

    @staticmethod
    def formula(weight, bias, p, x):
        return x @ (weight + p["u"][:, None] * p["v"] * weight).T + bias


class TurnedRowsDelta(WeightMap):
    """W' = (W + u v^T), with the norms of its rows as they were, times m (DoRA)."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        rows, columns = outer_sizes(self, target)
        self.m = vector(rows, target, 1.0)
        self.u, self.v = vector(rows, target), vector(columns, target, 0.7)

    def new_weight(self, weight):
        turned = weight + self.u[:, None] * self.v
        norms = weight.norm(dim=1) / turned.norm(dim=1)
        return turned * (norms * self.m)[:, None]

    @staticmethod
    def formula(weight, bias, p, x):
        turned = weight + torch.outer(p["u"], p["v"])
        length = (weight**2).sum(1).sqrt() / (turned**2).sum(1).sqrt()
        return x @ torch.einsum("oi,o,o->oi", turned, length, p["m"]).T + bias


class BiasedDelta(WeightMap):
    """W' = W + u v^T * W and, where there is a bias, b' = b + s * b + W c."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        rows, columns = outer_sizes(self, target)
        self.u, self.v = vector(rows, target), vector(columns, target, 0.7)
        if self.has_bias:
            self.s, self.c = vector(rows, target), vector(columns, target)

    def weight_update(self, weight):
        return self.u[:, None] * self.v * weight

    def bias_update(self, weight, bias):
        return self.s * bias + weight @ self.c.to(weight.dtype)

    @staticmethod
    def formula(weight, bias, p, x):
        changed = bias + p["s"] * bias + torch.einsum("oi,i->o", weight, p["c"]) if "c" in p else bias
        return x @ (weight + torch.outer(p["u"], p["v"]) * weight).T + changed


def outer_sizes(delta, target):
    d_in, d_out = sizes(target, delta.word())
    return d_out, d_in


class AroundDelta(CallContext):
    """Shifts the input by `before`, scales and shifts the output by `behind`; notes what is open."""

    opened: ClassVar[list] = []

    def __init__(self, target: Target) -> None:
        super().__init__()
        d_in, d_out = sizes(target, self.word())
        self.before, self.behind = vector(d_in, target), vector(d_out, target)

    def enter(self, target, args, kwargs):
        self.opened.append(self)
        x, *rest = args
        for peer in self.peers(target):
            x = x + peer.before
        return (x, *rest), kwargs

    def leave(self, target, args, kwargs, output):
        self.opened.remove(self)
        for peer in self.peers(target):
            # With `behind` itself added, two of them would give the same in either order.
            output = output * (1 + peer.behind) + peer.behind**2
        return output

    def abandon(self, target):
        if self in self.opened:
            self.opened.remove(self)

    @staticmethod
    def formula(weight, bias, p, x):
        return ((x + p["before"]) @ weight.T + bias) * (1 + p["behind"]) + p["behind"] ** 2


@dataclass(frozen=True, kw_only=True)
class Affine(dk.Method):
    name: ClassVar[str] = "test_output"
    kind: ClassVar[type[DeltaModule]] = AffineDelta


@dataclass(frozen=True, kw_only=True)
class Turn(dk.Method):
    name: ClassVar[str] = "test_input"
    kind: ClassVar[type[DeltaModule]] = TurnDelta


@dataclass(frozen=True, kw_only=True)
class FrozenFactors(dk.Method):
    name: ClassVar[str] = "test_low_rank"
    kind: ClassVar[type[DeltaModule]] = FrozenFactorsDelta
    r: int = 3
    start: int = 17

    def build_at(self, target: Target) -> DeltaModule:
        return FrozenFactorsDelta(target, self.r)

    def build_shared(self, index, targets: Sequence[Target]) -> nn.Module:
        # As large as any backbone here needs, so that every set of targets reads the same numbers.
        recipes = {"A0": ((self.r, 97), normal(0.5)), "B0": ((97, self.r), normal(0.5))}
        return Seeded(self.start, recipes, **like(targets[0]))


@dataclass(frozen=True, kw_only=True)
class Rescaled(dk.Method):
    name: ClassVar[str] = "test_weight_update"
    kind: ClassVar[type[DeltaModule]] = RescaledDelta


@dataclass(frozen=True, kw_only=True)
class TurnedRows(dk.Method):
    name: ClassVar[str] = "test_new_weight"
    kind: ClassVar[type[DeltaModule]] = TurnedRowsDelta


@dataclass(frozen=True, kw_only=True)
class Biased(dk.Method):
    name: ClassVar[str] = "test_weight_and_bias"
    kind: ClassVar[type[DeltaModule]] = BiasedDelta


@dataclass(frozen=True, kw_only=True)
class Around(dk.Method):
    name: ClassVar[str] = "test_call_context"
    kind: ClassVar[type[DeltaModule]] = AroundDelta


KINDS = {
    "output": Affine,
    "input": Turn,
    "low_rank": FrozenFactors,
    "weight_update": Rescaled,
    "new_weight": TurnedRows,
    "weight_and_bias": Biased,
}
EVERY_KIND = {**KINDS, "call_context": Around}
ON_WEIGHTS = ("low_rank", "weight_update", "new_weight", "weight_and_bias")


def values(delta_module):
    """The tensors that a delta module computes with, by name, in float64."""
    found = dict(delta_module.named_parameters())
    if delta_module.shared is not None:
        found |= {**dict(delta_module.shared.named_parameters()), **dict(delta_module.shared.named_buffers())}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def by_hand(layer, delta_module, x):
    """What a linear layer with a delta module gives, by the formula, in float64."""
    weight = layer.weight.detach().double()
    weight = weight.T if type(layer).__name__ == "Conv1D" else weight
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    return type(delta_module).formula(weight, bias, values(delta_module), x.double())
