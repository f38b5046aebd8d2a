"""LoRA: y = W x + (alpha / r) B A x.  Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.

Default targets are the query and value projections (section 4.2 and the authors' README). A is Kaiming-uniform with
a = sqrt(5), as in the authors' code, where the paper says Gaussian. Rank-stabilised scaling alpha / sqrt(r):
Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.errors import OptionError, TargetError
from deltakit.linears import is_conv1d
from deltakit.method import DeltaModule, Method, Target
from deltakit.shapes import like, sizes, wide


class LoRADelta(DeltaModule):
    """A low-rank change of a linear map: `A` [r, d_in] down and `B` [d_out, r] up again, zero at the start."""

    def __init__(self, d_in: int, d_out: int, r: int, scale: float, dropout: float, **like: Any) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(r, d_in, **like))
        self.B = nn.Parameter(torch.empty(d_out, r, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # a = sqrt(5) is nn.Linear's own default; the authors' code uses it for A too.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(
        self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        h = F.linear(self.dropped(x).to(self.A.dtype), self.A) * self.scale
        return y + F.linear(h, self.B).to(y.dtype)

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        update = self.scale * wide(self.B) @ wide(self.A)
        return {"weight": update.T if is_conv1d(target) else update}

    def summary(self) -> str:
        r = self.A.shape[0]
        scaling = f"alpha={self.scale * r:g}" if (self.scale * r).is_integer() else f"scale={self.scale:g}"
        return f"r={r} {scaling}" + (f" dropout={self.dropout:g}" if self.dropout else "")


class LoRAEmbeddingDelta(LoRADelta):
    """LoRA on an embedding: the row of `A` [r, vocabulary] that belongs to each id, up through `B` [d, r].

    As in the authors' code A starts at zero and B Gaussian: a product with one-hot rows needs no projection down.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def forward(self, x: Shaped[Tensor, "*batch"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        h = F.embedding(x, self.A.T)
        return y + (F.linear(self.dropped(h), self.B) * self.scale).to(y.dtype)

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        return {"weight": self.scale * (wide(self.B) @ wide(self.A)).T}


class LoRAConv2dDelta(LoRADelta):
    """LoRA on a 2-d convolution: `A` is a convolution of its geometry to r channels, `B` one of kernel 1 back."""

    def __init__(self, target: nn.Conv2d, r: int, scale: float, dropout: float, **like: Any) -> None:
        self.shape = (target.in_channels, *target.kernel_size)
        self.geometry: dict[str, Any] = {
            "stride": target.stride,
            "padding": target.padding,
            "dilation": target.dilation,
        }
        super().__init__(math.prod(self.shape), target.out_channels, r, scale, dropout, **like)

    def forward(self, x: Float[Tensor, "*n c h w"], y: Float[Tensor, "*n d h2 w2"]) -> Float[Tensor, "*n d h2 w2"]:
        down = self.A.view(-1, *self.shape)
        h = F.conv2d(self.dropped(x).to(self.A.dtype), down, **self.geometry) * self.scale
        return y + F.conv2d(h, self.B[:, :, None, None]).to(y.dtype)

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        return {"weight": (self.scale * wide(self.B) @ wide(self.A)).view(-1, *self.shape)}


@dataclass(frozen=True, kw_only=True)
class LoRA(Method, name="lora"):
    """Low-rank updates of linear maps, embeddings and 2-d convolutions.

    `r`: the rank, at least 1 and at most the smaller side of the weight. `alpha`: the update is scaled by alpha / r,
    or by alpha / sqrt(r) with `rslora`; not negative. `dropout`: probability in [0, 1) on the input of the update.
    """

    r: int = 8
    alpha: float = 16
    rslora: bool = False
    dropout: float = 0.0

    default_at: ClassVar = (("attn.q", "attn.qkv"), ("attn.v", "attn.kv"))

    def validate(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise OptionError(f"LoRA(r={self.r!r}): the rank must be an integer of at least 1")
        if not self.alpha >= 0 or math.isinf(self.alpha):
            raise OptionError(f"LoRA(alpha={self.alpha!r}): must be a finite number, not negative; r and 2 r are usual")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"LoRA(dropout={self.dropout!r}): a probability in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def build_at(self, target: Target) -> DeltaModule:
        path, module = target.path, target.module
        options, new = (self.r, self.scale, self.dropout), like(target)
        d_in, d_out = sizes(target, self.name)
        if self.r > min(d_in, d_out):
            raise OptionError(
                f"{path}: rank {self.r} is above the layer's size {d_in} to {d_out}; at most {min(d_in, d_out)}"
            )
        if isinstance(module, nn.Conv2d):
            _refuse(path, module, module.groups != 1 or module.padding_mode != "zeros", "groups=1 and zero padding")
            return LoRAConv2dDelta(module, *options, **new)
        if isinstance(module, nn.Embedding):
            # max_norm rewrites the weight during forward; a subclass's forward (Gemma's scales) is not a plain look-up.
            changed = module.max_norm is not None or type(module).forward is not nn.Embedding.forward
            _refuse(path, module, changed, "torch's own forward, without max_norm")
            return LoRAEmbeddingDelta(d_in, d_out, *options, **new)
        return LoRADelta(d_in, d_out, *options, **new)


def _refuse(path: str, module: nn.Module, unlike: bool, expected: str) -> None:
    if unlike:
        raise TargetError(f"{path}: LoRA on this kind expects {expected}, found {module}; narrow with of= or exclude=")
