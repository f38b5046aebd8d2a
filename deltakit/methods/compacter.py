"""Compacter: an adapter whose weights are sums of Kronecker products: W = A_1 (x) B_1 + ... + A_n (x) B_n, B_i = S_i T_i.

Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647, section 4. All adapters share the matrices A_i (the PHM rule),
and the B_i have a low rank. Compacter++ has no adapters after attention: `Compacter(at="@ff.down")`. The defaults are those of
the authors' code: n = 4, reduction 32, rank 1. There A_i starts normal with 0.01, and S_i and T_i Glorot-uniform with a gain
of sqrt(2). Here T of the second layer is zero, so that an untrained adapter is the identity. The authors also train the layer
norms: attach with `train="@norm"` for that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, Target, gathered_in_training, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import Bottleneck, BottleneckMethod, like


class PHMRule(nn.Module):
    """The matrices A_i as `rule` [n, n, n], the i-th in rule[i]."""

    def __init__(self, n: int, **like: Any) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n, **like))
        if wants_start_values(self.rule):
            nn.init.normal_(self.rule, std=0.01)

    def forward(self) -> Float[Tensor, "n n n"]:
        return gathered_in_training(self.rule)


class PHMLinear(nn.Module):
    """y = x W + bias with W = sum_i A_i (x) S_i T_i: `left` [n, d_in/n, r], `right` [n, r, d_out/n] and `bias` [d_out]."""

    def __init__(self, d_in: int, d_out: int, options: "Compacter", **like: Any) -> None:
        super().__init__()
        n, r = options.division, options.r
        self.left = nn.Parameter(torch.empty(n, d_in // n, r, **like))
        self.right = nn.Parameter(torch.empty(n, r, d_out // n, **like))
        self.own = None if options.shared_rule else PHMRule(n, **like)
        self.bias = nn.Parameter(torch.empty(d_out, **like)) if options.bias else None

    def reset_parameters(self) -> None:
        for factors in (self.left, self.right):
            # Glorot's bound for each of the n matrices.
            bound = math.sqrt(2) * math.sqrt(6 / (factors.shape[1] + factors.shape[2]))
            nn.init.uniform_(factors, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], shared: Float[Tensor, "n n n"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        rule = self.own() if self.own is not None else shared
        # W is never built: with the features as a matrix [n, d_in/n], a Kronecker product is two small products.
        z = torch.einsum("...pu,iur->...ipr", x.unflatten(-1, (len(self.left), -1)), self.left)
        z = torch.einsum("...ipr,ipq->...iqr", z, rule)
        y = torch.einsum("...iqr,irv->...qv", z, self.right).flatten(-2)
        return y if self.bias is None else y + self.bias


class CompacterDelta(Bottleneck):
    """A bottleneck of two PHM layers `down` and `up`."""

    down: PHMLinear
    up: PHMLinear

    def __init__(self, target: Target, options: "Compacter") -> None:
        super().__init__(target, options, options.add_to)
        n, d = options.division, self.size
        if d % n:
            fits = max(other for other in range(1, n + 1) if d % other == 0)
            raise OptionError(
                f"{target.named}: Compacter(division={n}) does not divide its {d} features; use division={fits}, or leave it "
                "out with exclude="
            )
        self.down = PHMLinear(d, options.bottleneck(d), options, **like(target))
        self.up = PHMLinear(options.bottleneck(d), d, options, **like(target))
        if options.gate:
            self.add_gate(self.size, target)
        if wants_start_values(self.down.left):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        self.down.reset_parameters()
        self.up.reset_parameters()
        nn.init.zeros_(self.up.right)

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        # The targets of a model on several devices share one rule.
        rule = self.shared().to(y) if self.shared is not None else None
        return y + self.change(y if self.add_to == "output" else x, rule)

    def summary(self) -> str:
        n, _, r = self.down.left.shape
        return f"size={n * self.down.right.shape[-1]} n={n} r={r} {self.words}"


@dataclass(frozen=True, kw_only=True)
class Compacter(BottleneckMethod, name="compacter"):
    """Bottleneck adapters whose weights are sums of Kronecker products, applied to the output of their targets.

    Args:
        size: the size of the bottleneck in elements, a multiple of `division`.
        reduction: instead of `size`: the number of features is divided by it, at least 1; 32 by default. The result is rounded
            up to a multiple of `division`.
        division: the n of the paper, at least 1: the number of Kronecker products. It must divide the number of features.
        r: the rank of the matrices B_i, at least 1.
        shared_rule: whether all targets share the matrices A_i, as in the paper; else each layer has its own.
        bias: whether the two layers have biases.
        activation: gelu, gelu_tanh, relu, leaky_relu, silu or tanh.
        gate: whether a trained gate multiplies the result: a number in (0, 1) for each example, the mean of those of all
            positions (Mao et al. 2022, https://arxiv.org/abs/2110.07577). In decoders it sees later tokens.
        add_to: "output", or "input" for norms that are targets, as for `Adapter`.

    Raises:
        OptionError: if an option is out of its range, or both `size` and `reduction` are given.
    """

    kind: ClassVar[type[DeltaModule]] = CompacterDelta
    design: ClassVar[Design] = Design(form="f(y W_d + b_d) W_u + b_u, W = sum of A_i (x) S_i T_i")
    usual_reduction: ClassVar[int | None] = 32

    division: int = 4
    r: int = 1
    shared_rule: bool = True
    bias: bool = True
    activation: str = "gelu_tanh"
    add_to: Literal["output", "input"] = "output"

    def validate(self) -> None:
        super().validate()
        for option in ("division", "r"):
            value = getattr(self, option)
            if value < 1:
                raise OptionError(f"Compacter({option}={value}): expected at least 1")
        if self.size is not None and self.size % self.division:
            raise OptionError(
                f"Compacter(size={self.size}, division={self.division}): expected a size that is a multiple of division; use "
                f"size={-(-self.size // self.division) * self.division}"
            )

    def bottleneck(self, d: int) -> int:
        return -(-super().bottleneck(d) // self.division) * self.division

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return (("attn.o", "attn"), ("ff.down", "ff"))

    def build_at(self, target: Target) -> DeltaModule:
        return CompacterDelta(target, self)

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module | None:
        return PHMRule(self.division, **like(targets[0])) if self.shared_rule else None
