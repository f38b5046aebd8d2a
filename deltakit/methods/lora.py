"""LoRA: y = W x + (alpha / r) B A x.  Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.

Default targets are the query and value projections (section 4.2 and the authors' README). A is Kaiming-uniform with
a = sqrt(5), as in the authors' code, where the paper says Gaussian. Rank-stabilised scaling alpha / sqrt(r):
Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import DeltaModule, FeatureSlice, Method, MixedBatch, Target, hidden_input, is_conv1d, wide
from deltakit.errors import OptionError, TargetError
from deltakit.ops import (
    Product,
    add_by_rows,
    add_low_rank,
    fresh,
    like,
    of_few_tokens,
    shared_work,
    sizes,
    sum_of_products,
)


class LoRAFactors(DeltaModule):
    """A low-rank change of a linear map: `A` [r, d_in] down and `B` [d_out, r] up again, zero at the start.

    On a parameter that is a stack of matrices (the experts of a mixture) both have the stack's dimensions in front.
    """

    def __init__(
        self, d_in: int, d_out: int, options: "LoRA", feature_slice: FeatureSlice | None = None, **like: Any
    ) -> None:
        super().__init__()
        self.scale, self.dropout, self.feature_slice, self.keep = (
            options.scale,
            options.dropout,
            feature_slice,
            options.keep,
        )
        stack = like.pop("stack", ())
        self.A = nn.Parameter(torch.empty(*stack, options.r, d_in, **like))
        self.B = nn.Parameter(torch.empty(*stack, d_out, options.r, **like))
        if not self.A.is_meta:
            # There are no values to set there, and torch takes its time for them.
            self.reset_parameters()

    def reset_parameters(self) -> None:
        # Kaiming-uniform with a = sqrt(5), nn.Linear's own default: the authors' code uses it for A too.
        bound = 1 / math.sqrt(self.A.shape[-1])
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def update(self) -> Float[Tensor, "*stack d_out d_in"]:
        """What is added to a weight of the shape [d_out, d_in], in float32 or wider."""
        update = self.scale * wide(self.B) @ wide(self.A)
        return self.feature_slice.spread(update.mT).mT if self.feature_slice else update

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        """By ranks side by side, which is exact; in fewer ranks by the singular values, which loses least (Eckart-Young)."""
        a, b, lost, whole = sum_of_products(
            [(w * p.scale, p.A, p.B) for w, p in parts if isinstance(p, LoRAFactors)], self.A
        )
        self.A.copy_(a)
        self.B.copy_(b / self.scale)
        return lost, whole

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        return {"weight": self.update().mT if is_conv1d(target) else self.update()}

    def summary(self) -> str:
        r = self.A.shape[-2]
        scaling = f"alpha={self.scale * r:g}" if (self.scale * r).is_integer() else f"scale={self.scale:g}"
        return f"r={r} {scaling}" + (f" dropout={self.dropout:g}" if self.dropout else "")


class LoRADelta(LoRAFactors):
    """LoRA behind a linear layer, or behind the rows of a fused projection."""

    scales = True

    def after(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if type(output) is not Tensor:
            return super().after(target, args, kwargs, output)
        x = args[0] if args else hidden_input(args, kwargs)
        if self.feature_slice is None and not (self.dropout and self.training):
            scale = self.scale if self.record is None else self.scale * self.record.scale
            few = of_few_tokens(target, self, x, output, scale)
            if few is not None:
                return few
        layer, alone = fresh(target, self)
        return self(x, output, layer, alone)

    def after_rows(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        if type(output) is Tensor and not (self.dropout and self.training):
            plan = shared_work(self, target, batch)
            if plan is not None:
                x = args[0] if args else hidden_input(args, kwargs)
                in_place = not torch.is_grad_enabled() and fresh(target, self)[0] is not None
                return add_by_rows(self, plan, target, x, output, batch, in_place=in_place)
        batch.first.pop(target, None)
        return super().after_rows(target, args, kwargs, output, batch)

    def factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        """A, and B with the scale in it and zeros for the rows that are none of its own."""
        b = self.feature_slice.spread(self.B.mT).mT if self.feature_slice is not None else self.B
        return self.A, self.scale * self.strength * b

    def forward(
        self,
        x: Float[Tensor, "*batch d_in"],
        y: Float[Tensor, "*batch d_out"],
        layer: nn.Module | None = None,
        alone: bool = False,
    ) -> Float[Tensor, "*batch d_out"]:
        """y + scale x A^T B^T. `layer` and `alone`: what made y, and whether y is still as it was made."""
        if self.dropout and self.training:
            # What is dropped is another input than the layer's.
            x, alone = self.dropped(x), False
        a: Tensor = self.A
        b: Tensor = self.B
        start = 0
        if self.feature_slice is not None:
            # FeatureSlice that stand together are a part of the output; interleaved ones are spread over it with zeros between.
            b, start = (
                (b, self.feature_slice.start)
                if self.feature_slice.groups == 1
                else (self.feature_slice.spread(b.mT).mT, 0)
            )
        return add_low_rank(y, x, a, b, Product(self.scale * self.strength, start, self.keep), layer, alone)


class LoRAParameterDelta(LoRAFactors):
    """LoRA on a parameter, added to it for the time of the forward that reads it.

    The last two dimensions are the matrix [d_out, d_in], or [d_in, d_out] where the module says that its weights are
    transposed (`is_transposed`, as transformers' expert modules do); dimensions in front count matrices.
    """

    def __init__(self, target: Target, options: "LoRA", **like: Any) -> None:
        self.name = target.parameter
        self.flipped = bool(getattr(target.module, "is_transposed", False))
        d_in, d_out = sizes(target, options.name)
        weight = target.module._parameters[target.parameter]
        stack = tuple(weight.shape[:-2]) if weight is not None else ()
        if self.flipped:
            d_in, d_out = d_out, d_in
        super().__init__(d_in, d_out, options, target.feature_slice, stack=stack, **like)

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        return {self.name: self.update().mT if self.flipped else self.update()}


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class LoRAEmbeddingDelta(LoRAFactors):
    """LoRA on an embedding: the row of `A` [r, vocabulary] that belongs to each id, up through `B` [d, r].

    As in the authors' code A starts at zero and B Gaussian: a product with one-hot rows needs no projection down.
    """

    padding: int | None = None
    """The id of the padding, whose row the backbone's own embedding gives no gradient either."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def forward(self, x: Shaped[Tensor, "*batch"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        h = F.embedding(x, self.A.T, padding_idx=self.padding)
        return y + (F.linear(self.dropped(h), self.B) * self.scale).to(y.dtype)

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        return {"weight": self.update().mT}


class LoRAConvDelta(LoRAFactors):
    """LoRA on a convolution: `A` is one of its geometry to r channels in each group, `B` one of kernel size 1 back.

    Both together are the convolution with the weight B A, of rank r over all groups.
    """

    scales = True

    def __init__(self, target: nn.modules.conv._ConvNd, options: "LoRA", **like: Any) -> None:
        self.groups = target.groups
        self.shape = (target.in_channels // target.groups, *target.kernel_size)
        super().__init__(math.prod(self.shape), target.out_channels, options, **like)

    def after(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = self.dropped(hidden_input(args, kwargs)).to(self.A.dtype)
        down = self.A.view(-1, *self.shape).repeat(self.groups, *[1] * len(self.shape))
        h = target._conv_forward(x, down, None) * (self.scale * self.strength)  # type: ignore[operator]
        up = self.B[(..., *[None] * (len(self.shape) - 1))]
        return output + _CONVOLUTIONS[len(self.shape) - 2](h, up, groups=self.groups).to(output.dtype)

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        return {"weight": self.update().view(-1, *self.shape)}


@dataclass(frozen=True, kw_only=True)
class LoRA(Method, name="lora"):
    """Low-rank updates of linear maps, embeddings, convolutions and bare parameters.

    `r`: the rank, at least 1 and at most the smaller side of the weight. `alpha`: the update is scaled by alpha / r,
    or by alpha / sqrt(r) with `rslora`; not negative. `dropout`: probability in [0, 1) on the input of the update.
    `keep`: "exact", or "int8" to keep the inputs that the gradient of A needs in one byte a value; the gradients of A are then
    off by about half a percent, all others exact. `untie`: let it work at one module alone although its weight is tied.
    """

    r: int = 8
    alpha: float = 16
    rslora: bool = False
    dropout: float = 0.0
    keep: str = "exact"
    untie: bool = False

    weights: ClassVar = True
    default_at: ClassVar = (("attn.q", "attn.qkv"), ("attn.v", "attn.kv"))

    def validate(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise OptionError(f"LoRA(r={self.r!r}): the rank must be an integer of at least 1")
        if not self.alpha >= 0 or math.isinf(self.alpha):
            raise OptionError(f"LoRA(alpha={self.alpha!r}): must be a finite number, not negative; r and 2 r are usual")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"LoRA(dropout={self.dropout!r}): a probability in [0, 1)")
        if self.keep not in ("exact", "int8"):
            raise OptionError(f"LoRA(keep={self.keep!r}): 'exact' or 'int8'")

    @classmethod
    def combination(cls, methods: Sequence[Method], rank: int | None) -> "LoRA":
        r = rank or sum(method.r for method in methods if isinstance(method, LoRA))
        return cls(r=r, alpha=r)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def by_weight(self, target: Target) -> bool:
        # With a forward of its own a subclass may do anything with the rows of an embedding (Gemma scales them), or with
        # the input and the weight of a convolution (BiT pads, and standardises).
        return super().by_weight(target) or _own_forward(target.module)

    def build_at(self, target: Target) -> DeltaModule:
        path, module = target.path, target.module
        new = like(target)
        d_in, d_out = sizes(target, self.name)
        self._check(target, d_in, d_out)
        if target.parameter:
            return LoRAParameterDelta(target, self, **new)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return LoRAConvDelta(module, self, **new)
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None:
                raise TargetError(f"{path}: LoRA expects an embedding without max_norm, which rewrites its weight")
            delta = LoRAEmbeddingDelta(d_in, d_out, self, **new)
            delta.padding = module.padding_idx
            return delta
        return LoRADelta(d_in, d_out, self, target.feature_slice, **new)

    def _check(self, target: Target, d_in: int, d_out: int) -> None:
        if self.r > min(d_in, d_out):
            raise OptionError(
                f"{target.path}: rank {self.r} is above the layer's size {d_in} to {d_out}; at most {min(d_in, d_out)}"
            )
        if self.dropout and self.by_weight(target):
            raise OptionError(
                f"{target.path}: LoRA(dropout={self.dropout:g}) drops inputs, and here it works by the weight, for the "
                "weight is read where no hook sees its input; use dropout=0 there"
            )
        if target.tied and not target.parameter and not self.untie:
            weight = f"{target.path}.weight"
            raise TargetError(
                f"{target.path}: its weight is tied to {target.tied[0]}: an update here alone would make the two "
                f"differ; name the parameter '{weight}' for one update in both places, pass untie=True to update this "
                f"place alone, or leave it out with exclude={target.path!r}"
            )


def _own_forward(module: nn.Module) -> bool:
    kinds = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kind) and type(module).forward is not kind.forward for kind in kinds)
