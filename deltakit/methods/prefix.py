"""Prefix tuning: softmax(q [P_k; K]^T) [P_v; V] in every attention.  Li and Liang 2021, https://arxiv.org/abs/2101.00190.

P-tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602) trains keys and values directly, which is the default here;
`PTuningV2` has its defaults. With `reparam` an MLP over one embedding computes them (section 4.3); the MLP is not saved. A
prefix has no position, and every query sees it. It is inserted inside the attention instead of through `past_key_values`,
which would shift positions (`shift` does) and do nothing in encoders. An untrained prefix is not the identity: even a key of
zeros takes its share of the softmax.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Method, Target, hidden_input, wants_start_values
from deltakit.errors import OptionError, TargetError
from deltakit.ops import (
    FRONT,
    AttentionPrefix,
    EntersMode,
    GatedPrefix,
    PositionsDelta,
    PrefixMode,
    attends,
    attention_targets,
    check_dropout,
    enter_prefix_mode,
    enters_by_interface,
    first_block_only,
    heads_of,
    input_embeddings,
    install_prefixes,
    joined,
    joined_per_example,
    like,
    nothing_handed_on,
    refuse_without_first_block,
    stack_at,
    text_stack,
)


class PrefixDelta(AttentionPrefix):
    """`key` [heads, tokens, d_k] and `value` [heads, tokens, d_v]: parameters, or with `reparam` the output of an MLP."""

    def __init__(self, target: Target, options: "Prefix") -> None:
        super().__init__()
        self.heads, self.tokens, new = heads_of(target), options.tokens, like(target)
        self.dropout = options.dropout
        self.out: nn.Linear | None = None
        if options.reparam:
            d = self.heads.count * (self.heads.d_key + self.heads.d_value)
            self.out = nn.Linear(options.hidden, d, **new)
        else:
            self.key = nn.Parameter(torch.empty(self.heads.count, self.tokens, self.heads.d_key, **new))
            self.value = nn.Parameter(torch.empty(self.heads.count, self.tokens, self.heads.d_value, **new))
            if wants_start_values(self.key):
                self.reset_parameters()
        install_prefixes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # After unpickling in another process, transformers' attention interface does not know prefixes yet.
        install_prefixes()

    def reset_parameters(self) -> None:
        if self.out is None:
            # transformers' usual scale for embeddings. It is small next to the keys, so no head attends mainly to the prefix
            # at the start.
            nn.init.normal_(self.key, std=0.02)
            nn.init.normal_(self.value, std=0.02)

    def key_value(self) -> tuple[Float[Tensor, "heads prefix d_k"], Float[Tensor, "heads prefix d_v"]]:
        key, value = self.trained()
        if not (self.dropout and self.training):
            return key, value
        return F.dropout(key, self.dropout), F.dropout(value, self.dropout)

    def trained(self) -> tuple[Float[Tensor, "heads prefix d_k"], Float[Tensor, "heads prefix d_v"]]:
        """Returns the keys and values without dropout."""
        if self.out is None:
            return self.key, self.value
        vectors = self.out(self.shared()).view(self.tokens, self.heads.count, -1).transpose(0, 1)
        key, value = vectors.split([self.heads.d_key, self.heads.d_value], dim=-1)
        return key, value

    def saved_state(self) -> dict[str, Tensor]:
        key, value = self.trained()
        return {"key": key.detach(), "value": value.detach()}

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        if self.out is not None:
            # The MLP is not in the file, so keys and values are trained directly from now on.
            weight, self.out = self.out.weight, None
            self._modules.pop("shared", None)
            self.__dict__.pop("_shared", None)
            self.key, self.value = (
                nn.Parameter(state[name].to(weight, copy=True), weight.requires_grad) for name in ("key", "value")
            )
        super().load_saved(state)

    def summary(self) -> str:
        return f"tokens={self.tokens}" + (" reparam" if self.out is not None else "")


class GatedPrefixDelta(GatedPrefix, PrefixDelta):
    """A prefix whose keys and values are multiplied by `gate` [1, d], which starts near zero."""

    def __init__(self, target: Target, options: "Prefix") -> None:
        super().__init__(target, options)
        self.add_gate(target)


class PrefixModeDelta(GatedPrefix, EntersMode, PrefixDelta):
    """A prefix for attention outside transformers' attention interface: it overrides torch's functions in the forward."""

    def __init__(self, target: Target, options: "Prefix") -> None:
        super().__init__(target, options)
        if options.gate:
            self.add_gate(target)

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().enter(target, args, kwargs)
        prefixes, batch = self.peers(target), self.batch
        if batch is None:
            enter_prefix_mode(PrefixMode(target, *joined(prefixes)))
        else:
            times = batch.times(hidden_input(args, kwargs), target)
            enter_prefix_mode(PrefixMode(target, *joined_per_example(prefixes, batch, times)))


class FirstBlockPrefixDelta(PrefixDelta):
    """A prefix that leaves T5 relative positions in its first block only."""

    mixable: ClassVar[bool] = False

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs, front = first_block_only(self, target, args, kwargs)
        return args, {**kwargs, FRONT: front}

    def leave(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return nothing_handed_on(super().leave(target, args, kwargs, output))

    def summary(self) -> str:
        return f"{super().summary()} relative_positions=first_block"


class FirstBlockModeDelta(FirstBlockPrefixDelta, PrefixModeDelta):
    """The same for T5 as it was before it used transformers' attention interface."""

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs, front = first_block_only(self, target, args, kwargs)
        enter_prefix_mode(PrefixMode(target, *self.key_value(), front=front))
        return args, kwargs


class PrefixMLP(nn.Module):
    """The MLP tanh(W e + b) over one embedding e of the prefix, shared by all targets (section 4.3)."""

    def __init__(self, tokens: int, width: int, hidden: int, **like: Any) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(tokens, width, **like))
        self.inner = nn.Linear(width, hidden, **like)
        if wants_start_values(self.embedding):
            nn.init.normal_(self.embedding)

    def forward(self) -> Float[Tensor, "prefix hidden"]:
        return torch.tanh(self.inner(self.embedding))


@dataclass(frozen=True, kw_only=True)
class Prefix(Method, name="prefix"):
    """Trained keys and values in front of every attention's own. A target is any module with attention at or below it.

    Args:
        tokens: the length of the prefix, at least 1; 10 is the authors' default.
        reparam: whether to train through an MLP, which is not saved with the delta.
        hidden: the number of hidden units of that MLP, at least 1 (512 in the paper's table-to-text runs).
        shift: whether the positions of the text start after the prefix, as where it enters through `past_key_values` (PEFT).
            It needs a model that takes `position_ids`.
        embed: the size of the vectors that the MLP reads, at least 1; by default the model's width, as in the paper.
        dropout: the probability in [0, 1) with which training drops values of the prefix.
        gate: whether a trained gate multiplies keys and values: a number in (0, 1) for each example, the mean of those of all
            positions of the attention's input (Mao et al. 2022, https://arxiv.org/abs/2110.07577). In decoders it sees later
            tokens.
        relative_positions: "first_block" is for T5 and reads OpenDelta's prefixes: the blocks after the first lose their
            relative positions, and in the first block the prefix stands before the text. It costs quality in new training:
            the model was trained with relative positions in all its blocks.

    Raises:
        OptionError: if an option is out of its range.
    """

    tokens: int = 10
    reparam: bool = False
    hidden: int = 512
    shift: bool = False
    embed: int | None = None
    dropout: float = 0.0
    gate: bool = False
    relative_positions: str = "all_blocks"

    identity: ClassVar[bool] = False

    def validate(self) -> None:
        for option in ("tokens", "hidden", "embed"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"{type(self).__name__}({option}={value}): expected at least 1")
        check_dropout(type(self).__name__, self.dropout)
        if self.relative_positions not in ("all_blocks", "first_block"):
            raise OptionError(
                f"{type(self).__name__}(relative_positions={self.relative_positions!r}): expected 'all_blocks' or "
                "'first_block'"
            )
        if self.gate and self.relative_positions == "first_block":
            raise OptionError(
                f"{type(self).__name__}(gate=True, relative_positions='first_block'): omit one of the two; OpenDelta has no "
                "gates"
            )

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        return attention_targets(index, selected, self.name)

    def kind_at(self, target: Target) -> type[PrefixDelta]:
        by_interface = enters_by_interface(target.module)
        if self.relative_positions == "first_block":
            return FirstBlockPrefixDelta if by_interface else FirstBlockModeDelta
        if not by_interface:
            return PrefixModeDelta
        return GatedPrefixDelta if self.gate else PrefixDelta

    def build_at(self, target: Target) -> DeltaModule:
        if self.relative_positions == "first_block":
            refuse_without_first_block(target)
        return self.kind_at(target)(target, self)

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        """Returns the delta modules at the attentions and, with `shift`, at the text stack.

        Raises:
            TargetError: if `shift` is set, and the backbone takes no positions.
        """
        inside = [target for target in targets if attends(target.module)]
        built = super().build(index, inside)
        if self.shift:
            group, *more = input_embeddings(index)
            stack, decoder = text_stack(index, group)
            counted = stack_at(index, stack, 0).positions
            if more or decoder is not None or counted not in ("given", "padding"):
                here = f"{type(index.by_path[stack]).__name__} {'has another beside it' if more or decoder else 'takes none'}"
                raise TargetError(
                    f"{stack or 'the backbone'}: {type(self).__name__}(shift=True) expects one text stack that takes "
                    f"position_ids, and this {here}; use shift=False"
                )
            built[stack] = PositionsDelta(self.tokens, counted)
        return built

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module | None:
        if not self.reparam:
            return None
        heads = heads_of(targets[0])
        width = self.embed or targets[0].width or heads.count * heads.d_key
        return PrefixMLP(self.tokens, width, self.hidden, **like(targets[0]))

    def to_dict(self) -> dict[str, Any]:
        # The MLP is not saved, only the keys and values that it computes.
        return super(Prefix, replace(self, reparam=False)).to_dict()


@dataclass(frozen=True, kw_only=True)
class PTuningV2(Prefix, name="p_tuning_v2"):
    """P-tuning v2: a prefix without an MLP, with defaults for classification. Train the head with it: `train="@head"`.

    Liu et al. 2022, https://arxiv.org/abs/2110.07602.

    Args:
        tokens: the length of the prefix, at least 1. Simple classification needs up to 20, labels for each token about 100
            (section 3.3).
        reparam: as for `Prefix`; by default not, because its gain differs between tasks (section 3.3).
        hidden: the number of hidden units of that MLP.
        shift: as for `Prefix`. The authors' code has it, because their prefix enters through `past_key_values`.
        embed: the size of the vectors that the MLP reads.
        dropout: the probability in [0, 1) with which training drops values of the prefix. In the authors' code it is the
            model's own for hidden states, 0.1 in BERT.
        gate, relative_positions: as for `Prefix`.

    Raises:
        OptionError: if an option is out of its range.
    """

    tokens: int = 20
    dropout: float = 0.1
