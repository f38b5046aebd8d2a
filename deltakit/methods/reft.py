"""ReFT: edits hidden states at a few positions of the text.  Wu et al. 2024, https://arxiv.org/abs/2404.03592, section 3.

With the hidden state h of a position: LoReFT gives h + R^T (W h + b - R h) with orthonormal rows of R; NoReFT is the same with
any R; DiReFT gives h + R^T (W h + b). The paper starts with random values, which change the outputs. Here W starts as R, or at
zero in DiReFT, so an untrained delta is exactly a no-op.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from deltakit.core import (
    BackboneView,
    DeltaModule,
    Design,
    Method,
    MixedBatch,
    Target,
    current_call,
    hidden_output,
    linear_sizes,
    replace_hidden,
    wants_start_values,
    wide,
)
from deltakit.errors import OptionError, StateError, TargetError
from deltakit.ops import OutputMap, attends, inserted_layout, like, refuse_two_texts


class ReFTDelta(OutputMap):
    """Edits the first and the last positions. `rotate` [units, r, d], `source` [units, r, d] and `bias` [units, r].

    The first unit edits the first positions, and the last unit the last ones; with tied weights there is one unit. The rows of
    R in LoReFT are those of `rotate`, made orthonormal one after the other.
    """

    reads_call: ClassVar[bool] = True

    def __init__(self, target: Target, options: "ReFT") -> None:
        super().__init__(target)
        if self.axis != -1 and any(isinstance(module, nn.Conv2d | nn.Conv3d) for module in target.module.modules()):
            raise TargetError(
                f"{target.named}: ReFT edits positions of a text, and this {type(target.module).__name__} returns images; use "
                "another method, or leave it out with exclude="
            )
        if options.r > self.size:
            raise OptionError(
                f"{target.named}: rank {options.r} is above its {self.size} features; use ReFT(r={self.size}) or less, or "
                "leave it out with exclude="
            )
        self.variant, self.first, self.last = options.variant, options.prefix_positions, options.suffix_positions
        units = 2 if self.first and self.last and not options.tied else 1
        shape = (units, options.r, self.size)
        self.rotate, self.source = (nn.Parameter(torch.empty(shape, **like(target))) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(shape[:2], **like(target)))
        if wants_start_values(self.rotate):
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.rotate.copy_(_orthonormal(torch.randn_like(wide(self.rotate))))
        nn.init.zeros_(self.source) if self.variant == "direft" else self.source.copy_(self.rows())
        nn.init.zeros_(self.bias)

    def rows(self) -> Float[Tensor, "units r d"]:
        """Returns R."""
        return _orthonormal(wide(self.rotate)).to(self.rotate.dtype) if self.variant == "loreft" else self.rotate

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if y.ndim != 3:
            raise StateError(
                f"ReFT edits positions of hidden states [batch, tokens, d], found the shape {tuple(y.shape)}; select the "
                "blocks with at='@block'"
            )
        rows = self.rows()
        for unit, (places, there) in enumerate(self.places(y)):
            index = places[..., None].expand(-1, -1, y.shape[-1])
            h, unit = y.gather(1, index), min(unit, len(rows) - 1)
            # Two products of one kind: where W is still R, they cancel bit-exactly.
            learned = F.linear(h, self.source[unit])
            learned = learned if self.variant == "direft" else learned - F.linear(h, rows[unit])
            change = (learned + self.bias[unit]) @ rows[unit]
            # A clone keeps the layout, by which later layers may choose how they round.
            y = y.clone().scatter_add_(1, index, torch.where(there[..., None], change, 0).to(y.dtype))
        return y

    def places(self, y: Float[Tensor, "batch seq d"]) -> list[tuple[Int[Tensor, "batch k"], Bool[Tensor, "batch k"]]]:
        """Returns the edited places in y, first and last ones apart, and which of them are in the text and in this call.

        The first positions are counted from the first token that is no padding, also where a cache holds it. The last ones are
        those of a call without a cache, and are no first ones.
        """
        call, (batch, length) = current_call(), y.shape[:2]
        if call.start is None:
            # The prompt is in the state of recurrent layers.
            return []
        layout = inserted_layout(call, length)
        length -= 0 if layout is None else layout.width
        start, end = _text(call.mask, call.start + length, batch, y.device)
        found = []
        first = start[:, None] + torch.arange(self.first, device=y.device)
        found.append((first, first < end[:, None]))
        if self.last:
            last = end[:, None] - self.last + torch.arange(self.last, device=y.device)
            found.append((last, (last >= start[:, None] + self.first) & (call.start == 0)))
        here = [(places - call.start, there) for places, there in found if places.shape[1]]
        inside = [(p.clamp(0, length - 1), there & (p >= 0) & (p < length)) for p, there in here]
        if layout is None:
            return inside
        # The positions are those of the text, without a soft prompt.
        places = layout.places(length, y.device).expand(batch, -1)
        return [(places.gather(1, p), there) for p, there in inside]

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        if self.record is None or self.record.name not in batch.names:
            return None
        # The mask of the call is that of all examples.
        y, new = hidden_output(output), hidden_output(self.after_call(target, args, kwargs, output))
        rows = batch.of(self.record.name, y, target)
        return replace_hidden(output, y.index_copy(0, rows, new.index_select(0, rows)))

    def summary(self) -> str:
        return f"{self.variant} r={self.rotate.shape[1]} first={self.first} last={self.last}"


def _has_positions(index: BackboneView) -> bool:
    """Returns whether a backbone has a layer or an attention that tells positions apart from features."""
    modules = index.by_path.values()
    if index.role("attn") or any(map(attends, modules)):
        return True
    others = [module for module in modules if linear_sizes(module) is None]
    return any(weight is not None and weight.ndim > 1 for module in others for weight in module._parameters.values())


def _orthonormal(matrix: Float[Tensor, "*stack r d"]) -> Float[Tensor, "*stack r d"]:
    """Returns the rows made orthonormal one after the other, each in its own direction."""
    q, r = torch.linalg.qr(matrix.mT)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    # Laid out as W is: torch may round other layouts otherwise.
    return (q * signs[..., None, :]).mT.contiguous()


def _text(
    mask: Tensor | None, length: int, batch: int, device: torch.device
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Returns where each text starts, and where it ends, among `length` tokens of which the mask tells the padding."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device), torch.full((batch,), length, device=device)
    if mask.ndim != 2 or mask.shape[1] < length:
        raise StateError(
            f"ReFT counts positions from the first token that is no padding: expected an attention mask [batch, {length}], "
            f"found the shape {tuple(mask.shape)}; pass the tokenizer's mask, or omit the mask if there is no padding"
        )
    real = mask[:, :length].to(device).bool().expand(batch, -1).long()
    return real.argmax(1), length - real.flip(1).argmax(1)


@dataclass(frozen=True, kw_only=True)
class ReFT(Method, name="reft"):
    """Representation finetuning: trained edits of the blocks' outputs at the first and last positions of the text.

    In generation the last positions are those of the prompt, which needs a cache (the default of `generate`).

    Args:
        variant: "loreft", "noreft" or "direft".
        r: the rank of the edits, at least 1.
        prefix_positions: the number of edited positions at the start of the text, padding not counted.
        suffix_positions: the number of edited positions at its end; at least one of the two numbers is not 0.
        tied: whether first and last positions have the same parameters.

    Raises:
        OptionError: if an option is out of its range.
    """

    kind: ClassVar[type[DeltaModule]] = ReFTDelta
    design: ClassVar[Design] = Design(form="R^T (W y + b - R y)", composition="addition")

    variant: Literal["loreft", "noreft", "direft"] = "loreft"
    r: int = 4
    prefix_positions: int = 3
    suffix_positions: int = 0
    tied: bool = False

    def validate(self) -> None:
        if self.r < 1:
            raise OptionError(f"ReFT(r={self.r}): expected a rank of at least 1; 4 is usual")
        numbers = self.prefix_positions, self.suffix_positions
        if min(numbers) < 0 or not any(numbers):
            raise OptionError(
                f"ReFT(prefix_positions={numbers[0]}, suffix_positions={numbers[1]}): expected numbers of at least 0, and one "
                "of them above 0"
            )

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return (("block",),)

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        refuse_two_texts(index, "reft", "ReFT counts positions")
        if self.at is None and not _has_positions(index):
            raise TargetError(
                f"reft: {index.owner} has only linear layers and norms, which take features without positions too, and ReFT "
                "edits positions of hidden states [batch, tokens, d]; use another method, or select layers that have such "
                "states with at="
            )
        return selected or ()

    def build_at(self, target: Target) -> DeltaModule:
        return ReFTDelta(target, self)
