"""Trainable tokens: some rows of an embedding, W[ids] + rows. Nothing else of the embedding is trained.

They are PEFT's `TrainableTokens` (https://huggingface.co/docs/peft/package_reference/trainable_tokens), but as a difference
from the backbone's rows, which starts at zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from deltakit.core import (
    BackboneView,
    DeltaModule,
    Design,
    Method,
    Target,
    hidden_input,
    hidden_output,
    is_quantized,
    replace_hidden,
    weight_view,
    wide,
)
from deltakit.errors import OptionError, TargetError
from deltakit.ops import OutputMap, has_own_forward, like, refuse_max_norm

_SHOWN = 3
"""The most ids that an error message names."""


class TrainableTokensDelta(OutputMap):
    """Adds `rows` [k, d] to the rows `ids` [k] of its target's weight. They start at zero.

    Args:
        first: the delta module that holds the rows, if it is at another module with the same weight.
    """

    has_weight_form: ClassVar[bool] = True
    ids: Tensor

    def __init__(self, target: Target, ids: Sequence[int], first: "TrainableTokensDelta | None" = None) -> None:
        # `OutputMap.__init__` refuses parameters, and features of a slice are no tokens.
        DeltaModule.__init__(self)
        module: Any = target.module
        self.embeds = isinstance(module, nn.Embedding)
        self.vocabulary, self.size = (
            (module.num_embeddings, module.embedding_dim) if self.embeds else (module.out_features, module.in_features)
        )
        self.view, self.feature_slice = weight_view(target), None
        self.tokens = tuple(ids)
        padding = module.padding_idx if self.embeds else None
        self.padding = self.tokens.index(padding) if padding in self.tokens else None
        start = torch.zeros(len(self.tokens), self.size, **like(target))
        self.rows = nn.Parameter(start) if first is None else None
        if first is not None:
            self.share(first, holds=False)
        # Not in files, because the method's options have the ids.
        self.register_buffer("ids", torch.tensor(self.tokens, device=start.device), persistent=False)

    @property
    def table(self) -> Float[Tensor, "k d"]:
        """The rows, which another delta module may hold."""
        own: Tensor = self.rows if self.rows is not None else self.shared.rows
        return own

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        return target.weight_read is not None or bool(target.parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainableTokensDelta":
        super()._apply(fn, recurse)
        ids = self._buffers["ids"]
        if ids is not None and not ids.is_meta:
            # `to_empty` leaves other numbers in it.
            ids.copy_(torch.tensor(self.tokens))
        return self

    def forward(
        self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch out"], factor: Any = 1.0
    ) -> Float[Tensor, "*batch out"]:
        """Returns y with the rows of the ids x added; of a linear layer, with the products of x and the rows added."""
        # The rows may be held by a module on another device.
        rows, ids = self.table.to(y.device), self.ids.to(y.device)
        if self.embeds:
            return y + (self._vectors(x, rows, ids) * factor).to(y.dtype)
        logits = F.linear(x.to(rows.dtype), rows) * factor
        return y.index_add(-1, ids, logits.to(y.dtype))

    def _vectors(self, x: Int[Tensor, "*batch"], rows: Tensor, ids: Tensor) -> Float[Tensor, "*batch d"]:
        """Returns the rows of the ids x, and zeros for all other ids."""
        # The ids are sorted. All others get a row of zeros behind the trained ones.
        place = torch.searchsorted(ids, x.to(ids.dtype).contiguous()).clamp(max=len(ids) - 1)
        place = torch.where(ids[place] == x, place, len(ids))
        # A row of padding gets no gradient, as in torch's embeddings.
        return F.embedding(place, F.pad(rows, (0, 0, 0, 1)), padding_idx=self.padding)

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # A subclass that scales its vectors has a weight patch, except where the weight is quantized.
        factor = self.strength * (getattr(target, "embed_scale", 1.0) if self.embeds else 1.0)
        return replace_hidden(output, self(hidden_input(args, kwargs), hidden_output(output), factor))

    def weight_updates(self, target: nn.Module) -> dict[str, Tensor]:
        if self.rows is None:
            return {}
        rows = wide(self.rows)
        return {self.view.name: rows.new_zeros(self.vocabulary, self.size).index_copy(0, self.ids, rows)}

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        if self.rows is None:
            return 0.0, 0.0
        total = torch.zeros_like(wide(self.rows))
        for weight, part in parts:
            if isinstance(part, TrainableTokensDelta):
                where = torch.searchsorted(self.ids, part.ids.to(self.ids.device))
                total = total.index_add(0, where, wide(part.table).to(total), alpha=weight)
        self.rows.copy_(total)
        return 0.0, float(total.square().sum())

    def summary(self) -> str:
        return f"tokens={len(self.tokens)}"


class TiedTokensDelta(TrainableTokensDelta):
    """Trainable tokens at one of several modules that share a weight. A forward need not call all of them."""

    must_be_called = False


class TrainableTokensPatchDelta(TrainableTokensDelta):
    """Trainable tokens as a weight patch, even on modules that are called."""

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method, name="trainable_tokens"):
    """Trains some rows of an embedding, such as those of new tokens. By default it is the one of the input ids.

    If an output layer shares the weight, its rows change with it. Of a linear layer such as an output layer, the rows are
    those of its weight [vocabulary, d]. As in torch, the row of an embedding's `padding_idx` gets no gradient from look-ups.

    >>> model = nn.Sequential(nn.Embedding(11, 3), nn.Linear(3, 5))
    >>> import deltakit as dk
    >>> delta = dk.attach(model, TrainableTokens(ids=[2, 7], at="0"))
    >>> delta.state_dict()["0.trainable_tokens.rows"].shape
    torch.Size([2, 3])

    Args:
        ids: the token ids, each once; at least one. They are kept in ascending order, which is the order of the rows.
        untie: whether to train rows of a module alone although other modules share its weight.

    Raises:
        OptionError: if an id is negative or there twice, or there are none.
    """

    design: ClassVar[Design] = Design(
        form="D[x], rows of zeros except for the ids", changes="output", insertion="parallel", composition="addition"
    )
    example: ClassVar[Mapping[str, Any]] = {"ids": (3, 5, 11)}

    ids: Sequence[int]
    untie: bool = False

    def validate(self) -> None:
        ids = tuple(sorted(self.ids))
        if not ids or ids[0] < 0:
            what = "expected token ids of at least 0" if ids else "expected at least one token id"
            raise OptionError(f"TrainableTokens(ids={_short(self.ids)}): {what}")
        twice = sorted({one for one, following in pairwise(ids) if one == following})
        if twice:
            raise OptionError(
                f"TrainableTokens(ids={_short(self.ids)}): expected each id once, found {_short(twice)} several times; "
                "write ids=sorted(set(ids))"
            )
        object.__setattr__(self, "ids", ids)

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        if selected is None:
            paths = [path for path in index.role("embed") if isinstance(index.by_path[path], nn.Embedding)]
            if not paths:
                raise TargetError(f"{index.owner}: it has no embedding of token ids; select a layer with at=")
            selected = [index.target(path) for path in paths]
            if self.untie:
                _refuse_several(index, selected)
        found = [one for target in selected for one in self._with_ties(index, target)]
        return list({target.path: target for target in found}.values())

    def _with_ties(self, index: BackboneView, target: Target) -> list[Target]:
        """Returns the modules that share a target's weight, or else the weight, which is then patched in all of them."""
        if not self._follows_ties(target):
            return [target]
        owners, names = zip(*(name.rpartition(".")[::2] for name in target.tied), strict=True)
        found = [target, *map(index.target, owners)]
        if set(names) == {"weight"} and all(map(_adds_rows, found)):
            return found
        return [index.target(f"{target.path}.weight" if target.path else "weight")]

    def _follows_ties(self, target: Target) -> bool:
        return bool(target.tied) and not target.part and not self.untie

    def kind_at(self, target: Target) -> type[TrainableTokensDelta]:
        if self._follows_ties(target):
            return TiedTokensDelta
        # As for LoRA: the subclass's own code must run with the new rows, unless the weight is quantized.
        quantized = isinstance(target.module, nn.Embedding) and is_quantized(target.module.weight)
        return TrainableTokensPatchDelta if has_own_forward(target.module) and not quantized else TrainableTokensDelta

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        """Returns the delta modules. Of those at modules that share a weight, the first holds the rows.

        Raises:
            TargetError: if a target is neither an embedding nor a linear layer.
            OptionError: if an id is beyond the vocabulary.
        """
        built: dict[str, DeltaModule] = {}
        firsts: dict[int, TrainableTokensDelta] = {}
        for target in targets:
            _check(target, self.ids)
            weight = id(target.module._parameters.get("weight")) if self._follows_ties(target) else id(target)
            module = self.kind_at(target)(target, self.ids, firsts.get(weight))
            firsts.setdefault(weight, module)
            built[target.path] = module
        for target in targets:
            owners = {name.rpartition(".")[0] for name in target.tied}
            built[target.path].covers_ties = self._follows_ties(target) and owners <= built.keys()
        return built

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> "TrainableTokens":
        """Returns the method with the ids of all parts."""
        return cls(ids=sorted({one for part in parts if isinstance(part, TrainableTokensDelta) for one in part.tokens}))


def _adds_rows(target: Target) -> bool:
    """Returns whether hooks on a module's output have the same effect as other rows in its weight."""
    module: Any = target.module
    plain = any(type(module).forward is kind.forward for kind in (nn.Embedding, nn.Linear))
    return plain and target.weight_read is None and not is_quantized(module.weight)


def _refuse_several(index: BackboneView, targets: Sequence[Target]) -> None:
    """Refuses embeddings that share their weight with others: which of them a forward calls is not known."""
    for target in targets:
        owners = (name.rpartition(".")[0] for name in target.tied)
        others = [owner for owner in owners if isinstance(index.by_path.get(owner), nn.Embedding)]
        if others:
            raise TargetError(
                f"{target.path}: {' and '.join(others)} share its weight, and which of them the model calls is not known; "
                f"with untie=True select one, such as at={others[0]!r}, or omit untie"
            )


def _check(target: Target, ids: Sequence[int]) -> None:
    """Refuses a target without such rows.

    Raises:
        TargetError: if it is neither an embedding nor a linear layer.
        OptionError: if an id is beyond its rows.
    """
    module = target.module
    if not isinstance(module, nn.Embedding | nn.Linear) or target.part not in ("", "weight"):
        raise TargetError(
            f"{target.named}: TrainableTokens trains rows of an Embedding or of a Linear layer, found "
            f"{f'{target.part} of a ' if target.part else 'a '}{type(module).__name__}; omit at=, or select the embedding"
        )
    refuse_max_norm(target, "TrainableTokens")
    rows = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
    if ids[-1] >= rows:
        beyond = [one for one in ids if one >= rows]
        raise OptionError(
            f"{target.named}: TrainableTokens(ids={_short(ids)}) has {_short(beyond)}, and there are only the ids 0 to "
            f"{rows - 1}; resize the embedding first (model.resize_token_embeddings), or leave them out"
        )


def _short(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN]))
    return f"[{shown}{', ...' if len(ids) > _SHOWN else ''}]"
