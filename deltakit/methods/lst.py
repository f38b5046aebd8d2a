"""LST: a small ladder network beside the backbone. No gradient passes through the backbone's blocks.

Sung et al. 2022, https://arxiv.org/abs/2206.06522, section 3: for each block i with the output h_i,
s_i = Block_i(g_i s_{i-1} + (1 - g_i) W_i h_i) with g_i = σ(α_i / 0.1), and s_0 = W_0 h_0. The blocks of the ladder are
1 / 8 as wide as the backbone's. Here they are MLPs over each token, s + V_2 gelu(V_1 norm(s)), without attention, so that
generation needs no cache of its own. The authors replace the backbone's last output; here the ladder is added to it through a
matrix of zeros, so that an untrained delta is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import (
    BackboneView,
    DeltaModule,
    Design,
    Method,
    MixedBatch,
    Target,
    hidden_input,
    hidden_output,
    parent_of,
    replace_hidden,
)
from deltakit.errors import OptionError, RoleError, TargetError
from deltakit.ops import Handover, InputTap, OutputMap, in_own_dtype, like, on_own_examples

_TEMPERATURE = 0.1
_INNER = 4
"""How many times wider the inner layer of a ladder's block is, as in most transformers."""

_ADVICE = (
    "call the whole backbone; switch off gradient checkpointing around whole blocks, which saves nothing here, because "
    "they keep no activations"
)


class Rung(nn.Module):
    """One step of the ladder: the gate `alpha`, the layer `down` that reads the backbone, and the block of the ladder."""

    def __init__(self, d: int, size: int, **like: Any) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, **like))
        self.down = nn.Linear(d, size, **like)
        self.norm = nn.LayerNorm(size, **like)
        self.up, self.out = nn.Linear(size, _INNER * size, **like), nn.Linear(_INNER * size, size, **like)

    def forward(self, s: Float[Tensor, "*batch k"], h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        below = self.down(h)
        # In autocast the layers return another dtype than that of the gate.
        s = torch.lerp(below, s, torch.sigmoid(self.alpha / _TEMPERATURE).to(below.dtype))
        change: Tensor = self.out(F.gelu(self.up(self.norm(s))))
        return s + change


class LSTDelta(OutputMap):
    """The ladder beside a row of blocks, at the last of them. It reads the inputs of all blocks and the last one's output."""

    weighable: ClassVar[bool] = False

    def __init__(self, target: Target, blocks: Sequence[Target], options: "LST") -> None:
        super().__init__(target)
        if self.axis != -1:
            raise TargetError(
                f"{target.named}: LST works on blocks whose features are the last dimension, found a "
                f"{type(target.module).__name__} with channels first; name other blocks with at="
            )
        size, new = options.size or max(1, self.size // options.reduction), like(target)
        self.first = nn.Linear(self.size, size, **new)
        self.rungs = nn.ModuleList(Rung(self.size, size, **new) for _ in blocks)
        self.norm, self.last = nn.LayerNorm(size, **new), nn.Linear(size, self.size, **new)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.handovers = tuple(Handover(block.named, target.named, _ADVICE) for block in blocks[:-1])

    def forward(self, *given: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Returns the last output, with the ladder's added. given: the inputs of all blocks, and the last output."""
        start, *states = (h.detach() for h in given)
        s: Tensor = self.first(start)
        for rung, h in zip(self.rungs, states, strict=True):
            s = rung(s, h)
        change: Tensor = self.last(self.norm(s))
        return given[-1] + change

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self._added(self._taken(args, kwargs), target, (), {}, output)

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        if not self.takes_part:
            return None
        # As the input it gets the numbers of the examples, by which it finds the inputs of all blocks.
        y = hidden_output(output)
        numbers = torch.arange(y.shape[0], device=y.device)
        return on_own_examples(
            self, target, (numbers,), {}, output, batch, partial(self._added, self._taken(args, kwargs))
        )

    def _taken(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return [*(handover.take() for handover in self.handovers), hidden_input(args, kwargs)]

    def _added(
        self, states: list[Tensor], target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        y = hidden_output(output)
        own = [h.index_select(0, args[0]) for h in states] if args else states
        if any(h.shape != y.shape for h in own):
            shapes = " and ".join(sorted({str(tuple(h.shape)) for h in (*own, y)}))
            raise TargetError(
                f"LST reads modules whose inputs and outputs are alike, and found hidden states of shape {shapes}; select the "
                "blocks of one stack with at="
            )
        new = in_own_dtype(self, *own, y)
        return replace_hidden(output, new if self.strength == 1 else torch.lerp(y, new, self.strength))

    def summary(self) -> str:
        return f"size={self.first.out_features} rungs={len(self.rungs)}"


@dataclass(frozen=True, kw_only=True)
class LST(Method, name="lst"):
    """A ladder network beside the blocks: the least memory in training, because no gradient passes through the blocks.

    By default it is beside the last row of blocks: the decoder of an encoder-decoder, the later one of two towers. `at=` names
    other blocks; those of one container get a ladder. Do not put one beside an encoder with a decoder, whose blocks its
    gradient would have to pass.

    Args:
        reduction: the width of the ladder is the backbone's divided by it, at least 1.
        size: the width of the ladder instead, at least 1.
        every: it reads every block (1), every second one (2), and so on, counted from the last one; at least 1.

    Raises:
        OptionError: if an option is out of its range.
    """

    design: ClassVar[Design] = Design(
        form="V s_n, s_i = B_i(g_i s_(i-1) + (1 - g_i) W_i h_i)", insertion="parallel", composition="addition"
    )

    reduction: int = 8
    size: int | None = None
    every: int = 1

    def validate(self) -> None:
        for option in ("reduction", "size", "every"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"LST({option}={value}): expected at least 1")

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        return None if target.never_called else LSTDelta

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        if selected is None:
            blocks = [index.target(path) for path in index.role("block")]
            if not blocks:
                raise RoleError(
                    f"lst: {index.owner} has no blocks that repeat, so there is no default position; name modules that are "
                    "called one after the other with at="
                )
            selected = _rows(index, blocks)[-1]
        return [target for row in _rows(index, selected) for target in row[(len(row) - 1) % self.every :: self.every]]

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        built: dict[str, DeltaModule] = {}
        for row in _rows(index, targets):
            ladder = LSTDelta(row[-1], row, self)
            taps = zip(row, ladder.handovers, strict=False)
            built |= {row[-1].path: ladder, **{block.path: InputTap((handover,)) for block, handover in taps}}
        return built


def _rows(index: BackboneView, targets: Sequence[Target]) -> list[list[Target]]:
    """Returns the targets of each container, in the order in which the backbone has them."""
    order = {path: place for place, path in enumerate(index.by_path)}
    found: dict[str, list[Target]] = {}
    for target in sorted(targets, key=lambda target: order[target.owner]):
        found.setdefault(parent_of(target.path), []).append(target)
    return list(found.values())
