"""Low-rank updates of some tokens: those from the last occurrence of an invocation sequence on (activated LoRA).

Greenewald et al. 2025, https://arxiv.org/abs/2504.12397, section 3. The keys and values of earlier tokens are those of the
backbone, so a cache that the backbone filled serves the delta too.

PEFT looks for the sequence in the ids of one call, and counts back from its end. So its steps of `generate` without a cache
act on too few tokens, those of a user's own loop with a cache on none, and beam search is refused. Here the sequence is looked
for in the whole text, of which the cache knows the earlier ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from deltakit.core import (
    CurrentCall,
    MixedBatch,
    Target,
    current_call,
    hidden_input,
    hidden_output,
    replace_hidden,
    whole_text,
)
from deltakit.errors import StateError, TargetError, warn
from deltakit.ops.fast_paths import fresh
from deltakit.ops.kinds.low_rank import LowRank
from deltakit.ops.low_rank_plain import Product
from deltakit.ops.prompt.layout import inserted_layout


class ActivatedLowRank(LowRank):
    """Adds the product to the tokens from the last occurrence of `invocation` on. The author writes `factors()`, and
    calls `act_after`.

    Tokens of examples without the sequence do not change. Only linear layers that are called can be its targets.
    """

    reads_call: ClassVar[bool] = True
    # It adds to some tokens, and a weight is for all.
    has_weight_form: ClassVar[bool] = False

    invocation: tuple[int, ...]

    def act_after(self, invocation: Sequence[int], target: Target) -> None:
        """Sets the sequence of token ids.

        Raises:
            TargetError: if the target is no linear layer.
        """
        if not self.linear:
            raise TargetError(
                f"{target.named}: LoRA(invocation=...) acts on the tokens of linear layers, found a "
                f"{type(target.module).__name__}; use LoRA without invocation= here, or leave it out with exclude="
            )
        self.invocation = tuple(invocation)

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        return False

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y = output if type(output) is Tensor else hidden_output(output)
        tokens = self.tokens_in(y)
        if tokens is None:
            return None
        layer, alone = fresh(target, self) if y is output else (None, False)
        new = self(hidden_input(args, kwargs), y, layer, alone, tokens)
        return new if y is output else replace_hidden(output, new)

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        if self.record is None or self.record.name not in batch.names:
            return None
        # The ids of the call are those of all examples.
        y = hidden_output(output)
        tokens = self.tokens_in(y)
        if tokens is None:
            return None
        rows = batch.of(self.record.name, y, target)
        own = torch.zeros_like(tokens).index_copy(0, rows, tokens.index_select(0, rows))
        return replace_hidden(output, self(hidden_input(args, kwargs), y, None, False, own))

    def forward(
        self,
        x: Float[Tensor, "*batch d_in"],
        y: Float[Tensor, "*batch d_out"],
        layer: nn.Module | None = None,
        alone: bool = False,
        tokens: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """Returns y with the product added to some tokens; None for all."""
        return self.added(x, y, layer, alone, Product(self.scaling * self.strength, keep=self.keep, tokens=tokens))

    def tokens_in(self, y: Float[Tensor, "*batch d_out"]) -> Bool[Tensor, "batch seq"] | None:
        """Returns which tokens of an output it acts on; None if there is none, and no gradient is wanted.

        Raises:
            StateError: if the ids of the call are not known, or are not those of the tokens of y.
        """
        call = current_call()
        key = "invocation", self.invocation
        if key not in call.kept:
            call.kept[key] = _activated(call, self.invocation)
        tokens, anywhere = call.kept[key]
        layout = inserted_layout(call, y.shape[1]) if y.ndim == 3 else None
        if layout is not None:
            # The tokens of a soft prompt are not in the text.
            tokens = layout.spread(tokens, tokens.new_zeros(layout.width), False)
        if y.shape[:-1] != tokens.shape:
            raise StateError(
                f"aLoRA acts on the tokens of hidden states [batch, tokens, d]: expected {tuple(tokens.shape)} and the "
                f"features, found the shape {tuple(y.shape)}; leave layers that get other tokens (experts, heads) out with "
                "exclude="
            )
        # With gradients the graph goes through the delta all the same, as others expect that wait for its gradients (DDP).
        return tokens.to(y.device) if anywhere or torch.is_grad_enabled() else None

    def update(self) -> Float[Tensor, "d_out d_in"]:
        self.refuse_merging()

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        self.refuse_merging()

    def refuse_merging(self) -> NoReturn:
        raise TargetError(
            "aLoRA changes the outputs of some tokens alone, and a weight is for all, so it cannot be merged; leave the delta "
            "attached"
        )


def _activated(call: CurrentCall, invocation: tuple[int, ...]) -> tuple[Bool[Tensor, "batch seq"], bool]:
    """Returns which tokens of a call are at or after the last occurrence of a sequence, and whether there are any.

    Warns if a call that starts a text has none.
    """
    text = whole_text(call)
    new = text.shape[1] if call.ids is None else call.ids.shape[1]
    first = _last_occurrence(text, call.mask, invocation)
    tokens = torch.arange(text.shape[1], device=text.device) >= first[:, None]
    tokens = tokens[:, text.shape[1] - new :]
    anywhere = bool(tokens.any())
    if not anywhere and call.start == 0:
        warn(
            f"no example of this batch has the invocation {list(invocation)} in its input_ids, so aLoRA changes nothing here; "
            "check that the tokenizer gives these ids inside the text"
        )
    return tokens, anywhere


def _last_occurrence(
    text: Int[Tensor, "batch text"], mask: Tensor | None, invocation: tuple[int, ...]
) -> Int[Tensor, " batch"]:
    """Returns where the last occurrence of a sequence starts in each text; the length of the text if there is none.

    Args:
        mask: tells the padding, which may have the same ids; it is used if it is one for the text.
    """
    length, size = text.shape[1], len(invocation)
    if length < size:
        return text.new_full((len(text),), length)
    here = (text.unfold(1, size, 1) == text.new_tensor(invocation)).all(-1)
    if mask is not None and mask.ndim == 2 and mask.shape[1] == length:
        here &= mask.to(text.device).bool().unfold(1, size, 1).all(-1)
    places = torch.arange(here.shape[1], device=text.device)
    last = torch.where(here, places, -1).amax(1)
    return torch.where(last < 0, length, last)
