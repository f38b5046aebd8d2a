"""Soft prompt: trained rows P among the input embeddings.  Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2.

The rows have token ids of their own, from the vocabulary's size on, so they may stand anywhere in a text; by default the
delta puts them in front of every text itself. FeatureSlice start as embeddings of the 5,000 first, most frequent tokens (section
3.2). Twenty tokens are the default: the paper sees little gain beyond (figure 3a). Attached, it is not the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Method, Target
from deltakit.errors import OptionError, StateError, TargetError
from deltakit.ops import (
    Insertion,
    grown_mask,
    input_embeddings,
    insert,
    layout_for,
    like,
    stack_at,
    text_stack,
    trimmed,
)
from deltakit.selection import BackboneIndex

_FREQUENT = 5_000


class PromptDelta(DeltaModule):
    """What all parts of a soft prompt share: where rows of a batch have prompts of their own, the first works for all."""

    by_rows: ClassVar[bool | None] = True
    tokens: int

    def peers(self, target: nn.Module) -> list[Any]:
        """The parts of its kind on a target that take part in a call; itself where no batch is held by rows."""
        if self.record is None or self.record.batch is None:
            return [self]
        there = [m for m in target._modules.values() if type(m) is type(self)]
        return [m for m in there if isinstance(m, PromptDelta) and m.live and m.takes_part]

    def first_of(self, target: nn.Module) -> bool:
        """Whether it is the part that works for all."""
        return next(iter(self.peers(target)), None) is self

    def after_rows(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: Any
    ) -> Any:
        acts = type(self).after is not DeltaModule.after and self.first_of(target)
        return self.after(target, args, kwargs, output) if acts else None

    def lengths(self, target: nn.Module) -> int | tuple[int, ...]:
        """How long the prompt is; by rows of a batch, that of each name."""
        if self.record is None or self.record.batch is None:
            return self.tokens
        own = {peer.record.name: peer.tokens for peer in self.peers(target)}
        return tuple(own.get(name, 0) for name in self.record.batch.names)


class PromptRowsDelta(PromptDelta):
    """The rows `prompt` [tokens, d] on one of the embeddings that share the input embedding's weight.

    The first of them holds the parameter; the others refer to it, so that it is counted, moved and saved once.
    """

    prompt: nn.Parameter
    _holder: tuple["PromptRowsDelta"]

    def __init__(self, holder: "PromptRowsDelta | None", tokens: int, vocabulary: int, start: Tensor | None) -> None:
        super().__init__()
        self.tokens, self.vocabulary = tokens, vocabulary
        if start is not None:
            self.prompt = nn.Parameter(start)
        self.__dict__["_holder"] = (holder or self,)

    @property
    def rows(self) -> Float[Tensor, "tokens d"]:
        return self._holder[0].prompt

    def before(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.first_of(target):
            return None
        ids = args[0] if args else kwargs["input"]
        if hasattr(ids, "prompt_rows"):
            raise StateError("two soft prompts are active on one embedding, with the same ids: detach() one of them")
        places = ids - self.vocabulary
        start, tokens = self._own(target, ids)
        mine = (places >= 0) & (places < tokens)
        known = torch.where(mine, 0, ids)
        # It goes with the call's own tensor: right under threads, recomputation and exceptions.
        known.prompt_rows = (torch.where(mine, places + start, 0), mine)  # type: ignore[attr-defined]
        return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "input": known})

    def _own(self, target: nn.Module, ids: Tensor) -> tuple[int | Tensor, int | Tensor]:
        """Where a row's prompt starts among the rows of all, and how long it is."""
        tokens = self.lengths(target)
        if isinstance(tokens, int):
            return 0, tokens
        batch, starts, total = self.record.batch, {}, 0
        for peer in self.peers(target):
            starts[peer.record.name] = total
            total += peer.tokens
        times = batch.times(ids.unsqueeze(-1), target)
        both = torch.tensor([[starts.get(name, 0), n] for name, n in zip(batch.names, tokens, strict=True)])
        both = both.to(ids.device).repeat_interleave(times, 0)
        return both[:, :1], both[:, 1:]

    def after(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ids = args[0] if args else kwargs["input"]
        index, mine = ids.prompt_rows
        peers = self.peers(target)
        table = self.rows if len(peers) == 1 else torch.cat([peer.rows.to(output.dtype) for peer in peers])
        # Embeddings that scale their rows (Gemma, BART) do so with these too.
        rows = table[index].to(output.dtype) * getattr(target, "embed_scale", 1.0)
        return torch.where(mine.unsqueeze(-1), rows.to(output.dtype), output)

    def saved_state(self) -> dict[str, Tensor]:
        return {"prompt": self.prompt.detach()} if self._holder[0] is self else {}

    def summary(self) -> str:
        return f"tokens={self.tokens}"


class InsertPromptDelta(PromptDelta):
    """Puts the prompt's ids into every call of the text stack, and takes its rows out of the result."""

    def __init__(self, insertion: Insertion) -> None:
        super().__init__()
        self.insertion, self.tokens = insertion, insertion.width

    def before(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.first_of(target):
            return None
        places = sorted({peer.insertion.at for peer in self.peers(target)})
        if len(places) > 1:
            raise StateError(f"rows: soft prompts at the places {places} of the text; expected one place for all rows")
        return insert(target, args, kwargs, self.insertion, self.lengths(target), self.record and self.record.batch)

    def after(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        layout = getattr(kwargs["input_ids"], "with_prompt", None)
        if layout is None or not self.insertion.trim:
            return output
        return trimmed(output, kwargs["input_ids"].shape[1] - layout.width, layout)


class PromptMaskDelta(PromptDelta):
    """Lets the decoder see the prompt's rows among the encoder's hidden states."""

    def __init__(self, insertion: Insertion) -> None:
        super().__init__()
        self.insertion, self.tokens = insertion, insertion.width

    def before(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if not self.first_of(target) or not isinstance(hidden, Tensor):
            return None
        batch = self.record.batch if self.record is not None else None
        layout = layout_for(self.insertion, self.lengths(target), batch, target, hidden[:, :, 0], cache=False)
        if mask is None and layout.lengths is not None:
            mask = hidden.new_ones(hidden.shape[0], hidden.shape[1] - layout.width, dtype=torch.long)
        if not isinstance(mask, Tensor) or mask.shape[-1] >= hidden.shape[1]:
            return None
        return args, {**kwargs, "encoder_attention_mask": grown_mask(target, mask, layout)}


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method, name="soft_prompt"):
    """A trained prompt among the input embeddings.

    `tokens`: its length, at least 1. `init`: "vocab" (rows of frequent tokens) or "random" (uniform within 0.5 of 0);
    `init_ids`: the token ids of a text to start from, repeated or cut to length. `prepend`: whether the delta puts the
    prompt into every text; if not, write its ids, from the vocabulary's size on, where you want them. `where`: "start",
    or "after_first" behind the first token; by default behind it where a pooler reads that token (BERT).
    """

    tokens: int = 20
    init: str = "vocab"
    init_ids: Sequence[int] | None = None
    prepend: bool = True
    where: str | None = None

    identity: ClassVar[bool] = False

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, **options: Any) -> "SoftPrompt":
        """A prompt that starts as the embeddings of a text, as long as the text unless `tokens` is given."""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return cls(**{"tokens": max(1, len(ids)), "init_ids": ids, **options})

    def validate(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise OptionError(f"SoftPrompt(tokens={self.tokens!r}): an integer of at least 1")
        if self.init not in ("vocab", "random"):
            raise OptionError(
                f"SoftPrompt(init={self.init!r}): 'vocab' or 'random'; for a text use SoftPrompt.from_text"
            )
        if self.where not in (None, "start", "after_first"):
            raise OptionError(f"SoftPrompt(where={self.where!r}): 'start', 'after_first' or None")
        if self.init_ids is not None:
            if not len(self.init_ids) or not all(isinstance(i, int) and i >= 0 for i in self.init_ids):
                raise OptionError(f"SoftPrompt(init_ids={self.init_ids!r}): a list of token ids, not empty")
            object.__setattr__(self, "init_ids", tuple(self.init_ids))

    def default_targets(self, backbone: nn.Module) -> Sequence[str]:
        return input_embeddings(backbone)

    def place(self, backbone: nn.Module, selected: Sequence[Target]) -> Sequence[Target]:
        embeddings = input_embeddings(backbone)
        for target in selected:
            if target.path not in embeddings:
                raise TargetError(
                    f"{target.path}: soft_prompt expects the embedding of the input ids, found a "
                    f"{type(target.module).__name__}; leave at= away"
                )
        if not self.prepend:
            return selected
        modules = BackboneIndex(backbone)
        return [*selected, *(modules.target(path) for path in text_stack(backbone) if path is not None)]

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        embeddings = [target for target in targets if isinstance(target.module, nn.Embedding)]
        first = embeddings[0]
        vocabulary = first.module.num_embeddings
        holder = PromptRowsDelta(None, self.tokens, int(vocabulary), self._start(first))  # type: ignore[arg-type]
        built: dict[str, DeltaModule] = {first.path: holder}
        for target in embeddings[1:]:
            built[target.path] = PromptRowsDelta(holder, self.tokens, holder.vocabulary, None)
        stack, decoder = text_stack(backbone) if len(embeddings) < len(targets) else (None, None)
        if stack is not None:
            at = self._place_in_text(backbone, stack)
            known = stack_at(backbone, stack, at)
            insertion = Insertion(holder.vocabulary, self.tokens, at, known, trim=decoder is None)
            built[stack] = InsertPromptDelta(insertion)
            if decoder is not None:
                built[decoder] = PromptMaskDelta(insertion)
        return built

    def _place_in_text(self, backbone: nn.Module, stack: str) -> int:
        if self.where is not None:
            return int(self.where == "after_first")
        # A pooler inside the stack takes the first row, before the prompt's rows are taken out of the result.
        return int(getattr(backbone.get_submodule(stack), "pooler", None) is not None)

    def _start(self, target: Target) -> Tensor:
        weight = target.module.weight
        assert isinstance(weight, Tensor)
        new = like(target)
        if self.init_ids is not None:
            outside = [i for i in self.init_ids if i >= weight.shape[0]]
            if outside:
                raise StateError(
                    f"{target.path}: init_ids holds {outside[0]}, beyond the vocabulary of {weight.shape[0]}"
                )
            rows = torch.tensor([self.init_ids[i % len(self.init_ids)] for i in range(self.tokens)])
            return weight.detach()[rows.to(weight.device)].to(**new).clone()
        if self.init == "random":
            return torch.empty(self.tokens, weight.shape[1], **new).uniform_(-0.5, 0.5)
        rows = torch.randint(min(_FREQUENT, weight.shape[0]), (self.tokens,))
        return weight.detach()[rows.to(weight.device)].to(**new).clone()
