"""Soft prompt: trained vectors P among the input embeddings.  Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2.

The vectors have token ids of their own, which follow the vocabulary's, so they can be anywhere in a text. By default the delta
inserts them in front of every text. They start as embeddings of the 5,000 first and most frequent tokens (section 3.2). The
default is 20 tokens: the paper sees little gain with more (figure 3a). An untrained prompt is not the identity.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, Method, Target, checked
from deltakit.errors import OptionError, StateError, TargetError
from deltakit.ops import (
    CallContext,
    Insertion,
    called_directly,
    finish,
    grown_mask,
    input_embeddings,
    insert,
    layout_for,
    stack_at,
    start_vectors,
    text_stack,
)


class PromptVectors(nn.Module):
    """The parameter `prompt` [tokens, d], shared by all embeddings that share the input embedding's weight (T5 has three)."""

    def __init__(self, start: Float[Tensor, "tokens d"]) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start)


class PromptDelta(CallContext):
    """The base of all parts of a soft prompt. In a mixed batch the first part at a target acts for all prompts there."""

    design: ClassVar[Design] = Design(form="P", changes="embeddings", insertion="parallel", composition="concatenation")
    mixable: ClassVar[bool] = True
    tokens: int

    def lengths(self, target: nn.Module) -> int | tuple[int, ...]:
        """Returns the length of the prompt in tokens; in a mixed batch the length for each example."""
        batch = self.batch
        if batch is None:
            return self.tokens
        own = {peer.record.name: peer.tokens for peer in self.peers(target)}
        return tuple(own.get(name, 0) for name in batch.names)


class PromptVectorsDelta(PromptDelta):
    """Makes one embedding return the prompt's vectors for the prompt's ids."""

    shared: PromptVectors

    def __init__(self, tokens: int, vocabulary: int, *, inserted: bool) -> None:
        super().__init__()
        self.tokens, self.vocabulary, self.inserted = tokens, vocabulary, inserted

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs["input"]
        if self.inserted:
            self._check_insertion()
        if self.batch is None and len(self.peers(target)) > 1:
            raise StateError("two soft prompts are active on one embedding and use the same ids; detach() one of them")
        if target.num_embeddings != self.vocabulary:
            raise StateError(
                f"the soft prompt uses the ids from {self.vocabulary} on, and the embedding has {target.num_embeddings} of "
                "its own: it was resized (resize_token_embeddings?); detach() the delta and attach a new one"
            )
        indices = ids - self.vocabulary
        start, tokens = self._start_and_length(target, ids)
        is_prompt = (indices >= 0) & (indices < tokens)
        known = torch.where(is_prompt, 0, ids)
        # `leave` needs both. They are attributes of the call's own tensor instead of the module, so that other threads, a
        # recomputation or an exception cannot mix them up.
        known.prompt_indices = (torch.where(is_prompt, indices + start, 0), is_prompt)  # type: ignore[attr-defined]
        return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "input": known})

    def _check_insertion(self) -> None:
        """Raises StateError if the text stack's forward was called directly, so that its hook inserted nothing."""
        # The embedding may also be called alone, and by a decoder, which gets no prompt. Both are fine.
        stack = called_directly(_inserts)
        if stack is not None:
            name = type(stack).__name__
            raise StateError(
                f"{name}: its forward was called directly, so torch ran no hooks and the soft prompt was not inserted; call "
                f"the module itself, model(...) instead of model.forward(...); if a library makes this call "
                "(sentence-transformers does), use Prefix instead of SoftPrompt"
            )

    def _start_and_length(self, target: nn.Module, ids: Int[Tensor, "*shape"]) -> tuple[int | Tensor, int | Tensor]:
        """Returns where each example's prompt starts among the vectors of all peers, and its length."""
        tokens, batch = self.lengths(target), self.batch
        if isinstance(tokens, int) or batch is None:
            return 0, self.tokens
        starts, total = {}, 0
        for peer in self.peers(target):
            starts[peer.record.name] = total
            total += peer.tokens
        times = batch.times(ids.unsqueeze(-1), target)
        both = torch.tensor([[starts.get(name, 0), n] for name, n in zip(batch.names, tokens, strict=True)])
        both = both.to(ids.device).repeat_interleave(times, 0)
        return both[:, :1], both[:, 1:]

    def leave(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ids = args[0] if args else kwargs["input"]
        if not hasattr(ids, "prompt_indices"):
            raise StateError(
                "the ids of this call are not those in which the soft prompt was found: another hook replaced them, or the "
                "delta was attached while the call ran; call the model again, and hold a lock around attach() and forwards"
            )
        index, is_prompt = ids.prompt_indices
        tables = [peer.shared.prompt.to(output.dtype) for peer in self.peers(target)]
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        # As some embeddings scale theirs (Gemma, BART): the prompt's vectors start as rows of the same weight.
        vectors = table[index].to(output.dtype) * getattr(target, "embed_scale", 1.0)
        return torch.where(is_prompt.unsqueeze(-1), vectors.to(output.dtype), output)

    # A file holds the vectors once, at the first of the embeddings.
    def saved_state(self) -> dict[str, Tensor]:
        return {"prompt": self.shared.prompt.detach()} if "shared" in self._modules else {}

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        if "shared" in self._modules:
            self.shared.load_state_dict(dict(state))

    def summary(self) -> str:
        return f"tokens={self.tokens}"


class InsertPromptDelta(PromptDelta):
    """Inserts the prompt's ids into every call of the text stack, and removes their hidden states from the result."""

    def __init__(self, insertion: Insertion) -> None:
        super().__init__()
        self.insertion, self.tokens = insertion, insertion.width

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = sorted({(peer.insertion.at, peer.insertion.trim) for peer in self.peers(target)})
        if len(places) > 1:
            raise StateError(
                f"rows: the soft prompts are inserted after {[at for at, _ in places]} tokens, with trim="
                f"{[trim for _, trim in places]}; expected the same for all examples; use one where= and trim= for all of them"
            )
        return insert(target, args, kwargs, self.insertion, self.lengths(target), self.batch)

    def leave(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return finish(kwargs, output, trim=self.insertion.trim)


class PromptMaskDelta(PromptDelta):
    """Extends the decoder's mask over the encoder's hidden states by the prompt."""

    def __init__(self, insertion: Insertion) -> None:
        super().__init__()
        self.insertion, self.tokens = insertion, insertion.width

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if not isinstance(hidden, Tensor):
            return None
        layout = layout_for(self.insertion, self.lengths(target), self.batch, target, hidden[:, :, 0], cache=False)
        if mask is None and layout.lengths is not None:
            mask = hidden.new_ones(hidden.shape[0], hidden.shape[1] - layout.width, dtype=torch.long)
        if not isinstance(mask, Tensor) or mask.shape[-1] >= hidden.shape[1]:
            return None
        return args, {**kwargs, "encoder_attention_mask": grown_mask(target, mask, layout)}


def _inserts(module: nn.Module) -> bool:
    """Whether a module is a text stack into which an active soft prompt is inserted."""
    return any(isinstance(child, InsertPromptDelta) and child.live for child in list(module._modules.values()))


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method, name="soft_prompt"):
    """A trained prompt among the input embeddings.

    Args:
        tokens: the length of the prompt, at least 1.
        init: "vocab" (embeddings of frequent tokens) or "random".
        init_range: random vectors are uniform within this distance of 0; above 0.
        init_ids: the token ids of a text to start from, repeated or cut to the length of the prompt.
        prepend: whether the delta inserts the prompt into every text. If not, write its ids (vocabulary size, vocabulary
            size + 1, and so on) where you want them.
        where: "start", or "after_first" for after the first token. By default after the first token if a pooler reads that
            token (BERT), else at the start.
        trim: whether the prompt's hidden states are removed, so that outputs are as long as the text. Those of an encoder
            always stay, for its decoder.

    Raises:
        OptionError: if an option is out of its range.
    """

    tokens: int = 20
    init: str = "vocab"
    init_range: float = 0.5
    init_ids: Sequence[int] | None = None
    prepend: bool = True
    where: str | None = None
    trim: bool = True

    identity: ClassVar[bool] = False

    @classmethod
    @checked
    def from_text(cls, text: str, tokenizer: Callable[..., Any], **options: Any) -> "SoftPrompt":
        """Returns a prompt that starts as the embeddings of a text. It is as long as the text unless `tokens` is given.

        Args:
            tokenizer: the backbone's tokenizer, such as transformers' `AutoTokenizer` returns.
            options: further options of `SoftPrompt`.

        Raises:
            OptionError: if the text has no tokens, the tokenizer returns no ids, or an option is out of its range.
        """
        try:
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:
            what = f"the tokenizer raised {type(error).__name__}: {error}; pass the backbone's tokenizer"
            raise OptionError(f"SoftPrompt.from_text: {what}") from error
        return cls(**{"tokens": max(1, len(ids)), "init_ids": ids, **options})

    def validate(self) -> None:
        if self.tokens < 1:
            raise OptionError(f"SoftPrompt(tokens={self.tokens}): expected at least 1")
        if self.init not in ("vocab", "random"):
            what = "expected 'vocab' or 'random'; for a text use SoftPrompt.from_text"
            raise OptionError(f"SoftPrompt(init={self.init!r}): {what}")
        if not self.init_range > 0:
            raise OptionError(f"SoftPrompt(init_range={self.init_range}): expected a number above 0; 0.5 is usual")
        if self.where not in (None, "start", "after_first"):
            raise OptionError(f"SoftPrompt(where={self.where!r}): expected 'start', 'after_first' or None")
        if self.init_ids is not None:
            if not self.init_ids or min(self.init_ids) < 0:
                raise OptionError(f"SoftPrompt(init_ids={self.init_ids!r}): expected a list of at least one token id")
            object.__setattr__(self, "init_ids", tuple(self.init_ids))

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        embeddings = [path for group in input_embeddings(index) for path in group]
        for target in selected or ():
            if target.path not in embeddings:
                found = type(target.module).__name__
                inside = [path for path in embeddings if path.startswith(f"{target.path}.")]
                raise TargetError(
                    f"{target.named}: soft_prompt expects the embedding of the input ids, found a {found}; omit at=, or write "
                    f"at={(inside or embeddings)[0]!r}"
                )
        return [index.target(path) for path in embeddings] if selected is None else selected

    def kind_at(self, target: Target) -> type[DeltaModule]:
        return PromptVectorsDelta

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        """Returns the delta modules at the embeddings and, with `prepend`, at the text stacks and their decoders, if any.

        Raises:
            TargetError: if `prepend` is set and no module around an embedding accepts `input_ids`.
            OptionError: if `init_ids` has an id beyond the vocabulary.
        """
        built: dict[str, DeltaModule] = {}
        for group in input_embeddings(index):
            own = [target for target in targets if target.path in group]
            built |= self._build_in_model(index, group, own) if own else {}
        return built

    def _build_in_model(
        self, index: BackboneView, group: Sequence[str], targets: Sequence[Target]
    ) -> dict[str, DeltaModule]:
        within = self.init_range if self.init == "random" else None
        start = start_vectors(targets[0], self.tokens, within=within, init_ids=self.init_ids)
        vectors, vocabulary = PromptVectors(start), int(targets[0].module.num_embeddings)  # type: ignore[arg-type]
        built: dict[str, DeltaModule] = {}
        for target in targets:
            built[target.path] = PromptVectorsDelta(self.tokens, vocabulary, inserted=self.prepend)
            built[target.path].share(vectors, holds=len(built) == 1)
        if self.prepend:
            stack, decoder = text_stack(index, group)
            at = self._tokens_before(index, stack)
            encodes = decoder is not None
            known = stack_at(index, stack, at)
            insertion = Insertion(vocabulary, self.tokens, at, known, self.trim and not encodes, encodes)
            built[stack] = InsertPromptDelta(insertion)
            if decoder is not None:
                built[decoder] = PromptMaskDelta(insertion)
        return built

    def _tokens_before(self, index: BackboneView, stack: str) -> int:
        if self.where is not None:
            return int(self.where == "after_first")
        # A pooler inside the stack reads the first hidden state before the prompt is removed from the result. So the text's
        # first token must stay first.
        return int(getattr(index.by_path[stack], "pooler", None) is not None)
