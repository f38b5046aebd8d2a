"""LoRA: y = W x + (alpha / r) B A x.  Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.

The default targets are the query and value projections (section 4.2 and the authors' README). A starts Kaiming-uniform with
a = sqrt(5) as in the authors' code; the paper says Gaussian. The rank-stabilised scaling alpha / sqrt(r) is from
Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.

- DoRA: W' = m (W + s B A) / ||W + s B A||, a norm per row. Liu et al. 2024, https://arxiv.org/abs/2402.09353, section 4.
- aLoRA acts on the tokens from an invocation sequence on. Greenewald et al. 2025, https://arxiv.org/abs/2504.12397, section 3.
- LoRA-FA never trains A, so the backward pass needs no x. Zhang et al. 2023, https://arxiv.org/abs/2308.03303, section 3.
- UniPELT: y = W x + g(x) s B A x, with one gate g for each example. Mao et al. 2022, https://arxiv.org/abs/2110.07577.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import (
    FROZEN,
    BackboneView,
    DeltaModule,
    Method,
    PerTarget,
    Target,
    bare_weight,
    one_value,
    values_of,
    wants_start_values,
)
from deltakit.errors import OptionError, TargetError
from deltakit.ops import (
    QUERIES_AND_VALUES,
    STARTS_WITH_A_PRODUCT,
    ActivatedLowRank,
    GatedLowRank,
    LowRank,
    NormedLowRank,
    check_alpha,
    check_dropout,
    check_patch_dropout,
    check_rank,
    check_weight,
    difference,
    kaiming_uniform,
    like,
    refuse_two_texts,
    stack_of,
    start_factors,
    sum_of_products,
)


class LoRADelta(LowRank):
    """The factors `A` [*stack, r, d_in] and `B` [*stack, d_out, r]. B starts at zero.

    With a start whose product is not zero, `A0` and `B0` keep that start.
    """

    tags: ClassVar[Mapping[str, str]] = {"A": "down", "B": "up", "A0": FROZEN, "B0": FROZEN}

    def __init__(self, target: Target, options: "LoRA") -> None:
        super().__init__(target, scaling=options.scaling, dropout=options.dropout, keep=options.keep)
        # The experts of a mixture are one parameter: a stack of matrices.
        stack, r = stack_of(target), one_value(options.r)
        where = like(target)
        self.A = nn.Parameter(torch.empty(*stack, r, self.d_in, **where))
        self.B = nn.Parameter(torch.empty(*stack, self.d_out, r, **where))
        self.options = options
        if options.start in STARTS_WITH_A_PRODUCT:
            self.A0, self.B0 = (nn.Parameter(torch.empty_like(factor)) for factor in (self.A, self.B))
        self.set_start_values(target)

    def set_start_values(self, target: Target) -> None:
        start = self.options.start
        if wants_start_values(self.A):
            self.reset_parameters()
            if start != "kaiming":
                start_factors(start, self.A, self.B, self.scaling, lambda: bare_weight(target.module, self.view))
            if start in STARTS_WITH_A_PRODUCT:
                self.A0.data.copy_(self.A.data)
                self.B0.data.copy_(self.B.data)

    def reset_parameters(self) -> None:
        if self.embeds:
            # As in the authors' code, where A is the zero factor of embeddings. A frozen A of zeros would never learn.
            drawn, zero = (self.A, self.B) if self.options.frozen_a else (self.B, self.A)
            nn.init.zeros_(zero)
            nn.init.normal_(drawn)
            return
        kaiming_uniform(self.A)
        nn.init.zeros_(self.B)

    def factors(self) -> tuple[Float[Tensor, "*stack r d_in"], Float[Tensor, "*stack d_out r"]]:
        own: Mapping[str, Any] = self._parameters
        # Pruned and parametrized ones are attributes, computed from other parameters.
        a, b = (own["A"], own["B"]) if "A" in own and "B" in own else (self.A, self.B)
        return difference(a, b, own["A0"], own["B0"]) if "A0" in own else (a, b)

    def tag_of(self, name: str) -> str:
        frozen = name == "A" if self.options.frozen_a else name == "B" and self.options.start == "mica"
        return FROZEN if frozen else super().tag_of(name)

    def start_at(self, directions: Tensor) -> None:
        self.A.copy_(directions)
        nn.init.zeros_(self.B)

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        # With ranks enough the factors are concatenated, which is exact. With fewer, the largest singular values are kept,
        # which has the smallest error of all sums of that rank (Eckart-Young).
        terms = [(weight * part.scaling, *part.factors()) for weight, part in parts if isinstance(part, LowRank)]
        a, b, lost, norm = sum_of_products(terms, self.A)
        self.A.copy_(a)
        self.B.copy_(b / self.scaling)
        return lost, norm

    def summary(self) -> str:
        r = self.A.shape[-2]
        alpha = self.scaling * r
        scaling = f"alpha={alpha:g}" if float(alpha).is_integer() else f"scale={self.scaling:g}"
        start = f" {self.options.start}" if self.options.start != "kaiming" else ""
        start += " frozen A" if self.options.frozen_a else ""
        return f"r={r} {scaling}{start}" + (f" dropout={self.dropout:g}" if self.dropout else "")


class DoRADelta(NormedLowRank, LoRADelta):
    """Also trains `m` [*stack, d_out]: what is added to the norms of the weight's rows. It starts at zero.

    The paper's m starts at the norms. The difference needs no weight to start with, and no dtype rounds it: so an untrained
    delta is exactly a no-op.
    """

    tags: ClassVar[Mapping[str, str]] = {**LoRADelta.tags, "m": "magnitude"}

    def __init__(self, target: Target, options: "LoRA") -> None:
        super().__init__(target, options)
        self.refuse_without_norms(target)
        self.m = nn.Parameter(torch.empty(self.B.shape[:-1], **like(target)))
        if wants_start_values(self.m):
            nn.init.zeros_(self.m)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "m" in self._parameters:
            nn.init.zeros_(self.m)

    def magnitudes(self) -> Float[Tensor, "*stack d_out"]:
        return self.m

    def summary(self) -> str:
        return f"{super().summary()} dora"


class ALoRADelta(ActivatedLowRank, LoRADelta):
    """Acts on the tokens from the last occurrence of `invocation` on."""

    def __init__(self, target: Target, options: "LoRA") -> None:
        super().__init__(target, options)
        self.act_after(options.invocation, target)

    def summary(self) -> str:
        return f"{super().summary()} after {len(self.invocation)} ids"


class GatedLoRADelta(GatedLowRank, LoRADelta):
    """Also trains `gate` [1, d_in] and its bias, which start near zero."""

    def __init__(self, target: Target, options: "LoRA") -> None:
        super().__init__(target, options)
        self.add_gate(target)

    def summary(self) -> str:
        return f"{super().summary()} gate"


@dataclass(frozen=True, kw_only=True)
class LoRA(Method, name="lora"):
    """Low-rank updates of linear layers, embeddings, convolutions and parameters.

    >>> import deltakit as dk
    >>> model = nn.Sequential(nn.Linear(7, 5))
    >>> dk.attach(model, dk.LoRA(r=2, at="0", frozen_a=True)).num_parameters  # LoRA-FA trains B [5, 2]
    10

    Args:
        r: the rank, at least 1 and at most the smaller side of the weight.
        alpha: the update is multiplied by alpha / r; at least 0. Both may differ between targets: with
            `r={"layers.{0-5}": 4, "*": 8}` it is 4 in the first six layers and 8 elsewhere. The first selector that matches
            the target, or a module around it, counts.
        rslora: multiply by alpha / sqrt(r) instead.
        dora: also train the norms of the new weight's rows (DoRA).
        invocation: token ids; LoRA then acts on the tokens from their last occurrence in a text on, and not at all in texts
            without them (aLoRA). Keys and values of earlier tokens stay those of the backbone. Needs `input_ids`, and linear
            layers as targets.
        frozen_a: never train A (LoRA-FA). For the backward pass r values per token are kept instead of the layer's input.
        gate: whether a trained gate multiplies the update, beside alpha / r: a number in (0, 1) for each example, the mean of
            those of all positions (UniPELT, where it is the only factor: alpha = r). In decoders it sees later tokens.
        start: "kaiming" (A is random and B zero), "gaussian" (the same with a normal A), "pissa", "olora", "orthogonal" (with
            an even rank) or "mica" (B is never trained). The outputs stay those of the backbone until A or B is trained.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        keep: "exact", or "int8" to store the inputs for the gradient of A with one byte per value. The gradient of A is
            then off by about half a percent; all other gradients are exact.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range.
    """

    per_target: ClassVar[tuple[str, ...]] = ("r", "alpha")
    copied: ClassVar[Sequence[type[DeltaModule]]] = (LoRADelta, DoRADelta, ALoRADelta)

    r: PerTarget[int] = 8
    alpha: PerTarget[float] = 16
    rslora: bool = False
    dora: bool = False
    invocation: Sequence[int] = ()
    frozen_a: bool = False
    gate: bool = False
    start: Literal["kaiming", "gaussian", "pissa", "olora", "orthogonal", "mica"] = "kaiming"
    dropout: float = 0.0
    keep: Literal["exact", "int8"] = "exact"
    untie: bool = False

    def validate(self) -> None:
        if min(values_of(self.r)) < 1:
            raise OptionError(f"LoRA(r={self.r}): expected a rank of at least 1; 8 is usual")
        check_alpha("LoRA", self.alpha)
        if self.start == "orthogonal" and any(r % 2 for r in values_of(self.r)):
            raise OptionError(f"LoRA(r={self.r}, start='orthogonal'): expected an even rank")
        if self.start == "pissa" and not all(values_of(self.alpha)):
            raise OptionError("LoRA(alpha=0, start='pissa'): expected an alpha above 0; the start is divided by it")
        check_dropout("LoRA", self.dropout)
        if self.frozen_a and self.start == "mica":
            raise OptionError(
                "LoRA(frozen_a=True, start='mica'): then nothing is trained, because 'mica' never trains B; omit one of them"
            )
        if not all(0 <= one < 2**63 for one in self.invocation):
            raise OptionError(f"LoRA(invocation={list(self.invocation)}): expected token ids of at least 0")
        object.__setattr__(self, "invocation", tuple(self.invocation))
        if self.gate and self.keep != "exact":
            raise OptionError(f"LoRA(gate=True, keep={self.keep!r}): the gate needs the exact inputs; use keep='exact'")
        forms = [name for name in ("dora", "gate", "invocation") if getattr(self, name)]
        if len(forms) > 1:
            raise OptionError(
                f"LoRA({forms[0]}=..., {forms[1]}=...): omit one of the two; dora= changes the weight for all tokens, "
                "gate= is one number for an example, and invocation= chooses tokens"
            )

    @property
    def scaling(self) -> float:
        """The factor of the update: alpha / r, or alpha / sqrt(r) with `rslora`."""
        r = one_value(self.r)
        return one_value(self.alpha) / (math.sqrt(r) if self.rslora else r)

    def with_rank(self, r: int) -> "LoRA":
        if self.start not in ("kaiming", "gaussian"):
            raise OptionError(f"LoRA(start={self.start!r}): a start from data is another one; omit start=")
        return replace(self, r=r, alpha=self.scaling * (math.sqrt(r) if self.rslora else r))

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return QUERIES_AND_VALUES

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        if self.invocation:
            refuse_two_texts(index, "lora", "LoRA(invocation=...) looks for its tokens")
        return selected or ()

    def kind_at(self, target: Target) -> type[LoRADelta] | None:
        some_positions = ALoRADelta if self.invocation else GatedLoRADelta if self.gate else None
        if some_positions is not None:
            # A weight patch is for all tokens.
            return None if target.never_called else some_positions
        return DoRADelta if self.dora else LoRADelta

    def build_at(self, target: Target) -> DeltaModule:
        kind = self.kind_at(target) or LoRADelta
        check_weight(target, "LoRA", untie=self.untie)
        check_patch_dropout(target, "LoRA", kind, self.dropout)
        check_rank(target, "LoRA", one_value(self.r))
        return kind(target, self)

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> "LoRA":
        other = next((part for part in parts if isinstance(part, DoRADelta | GatedLoRADelta)), None)
        if other is not None:
            raise TargetError(
                f"{other.word()} is not linear in its parameters, so it has no weighted sums; run the deltas one by one"
            )
        invocations = {part.invocation if isinstance(part, ALoRADelta) else () for part in parts}
        if len(invocations) > 1:
            raise TargetError(
                f"LoRAs that act on different tokens have no sum: found the invocations {sorted(map(list, invocations))}; run "
                "the deltas one by one"
            )
        r = sum(part.factors()[0].shape[-2] for part in parts if isinstance(part, LoRADelta)) if rank is None else rank
        return cls(r=r, alpha=r, invocation=invocations.pop())
