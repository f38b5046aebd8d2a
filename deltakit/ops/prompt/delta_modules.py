"""The delta modules of all soft prompts: vectors that an embedding returns for ids of their own, and their insertion."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltakit.core import Design, gathered
from deltakit.errors import StateError
from deltakit.ops.kinds.call_context import CallContext
from deltakit.ops.prompt.direct_call import called_directly
from deltakit.ops.prompt.insertion import Insertion, finish, grown_mask, insert, layout_for


class PromptVectors(nn.Module):
    """The vectors [tokens, d], shared by all embeddings that share the input embedding's weight (T5 has three).

    They are the parameter `prompt`, or what a module without arguments computes.

    Args:
        start: the vectors at the start, or that module.
        in_files: whether a file holds that module's tensors. If not, it holds the vectors, and a loaded delta trains them.
    """

    def __init__(self, start: Float[Tensor, "tokens d"] | nn.Module, *, in_files: bool = False) -> None:
        super().__init__()
        self.in_files = in_files
        self.encoder = start if isinstance(start, nn.Module) else None
        self.register_parameter("prompt", nn.Parameter(start) if isinstance(start, Tensor) else None)

    def forward(self) -> Float[Tensor, "tokens d"]:
        found: Tensor = self.prompt if self.encoder is None else self.encoder()
        return found

    def saved(self) -> dict[str, Tensor]:
        """Returns the tensors that a file holds."""
        if self.in_files and self.encoder is not None:
            return dict(self.encoder.state_dict())
        # FSDP2 keeps the parameters in parts. torch does not compute with parts and buffers together, and rounds otherwise.
        full = {name: gathered(parameter.detach()) for name, parameter in self.named_parameters()}
        return {"prompt": torch.func.functional_call(self, full, ()).detach()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Loads the tensors of a file."""
        if self.encoder is None:
            self.load_state_dict(dict(state))
        elif self.in_files:
            self.encoder.load_state_dict(dict(state))
        else:
            like = next(self.encoder.parameters())
            self.encoder, self.prompt = None, nn.Parameter(state["prompt"].to(like, copy=True), like.requires_grad)


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
        tables = [peer.shared().to(output.dtype) for peer in self.peers(target)]
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        # Some embeddings scale their vectors (Gemma, BART). The prompt's vectors start as rows of the same weight, so they
        # are scaled, too.
        vectors = table[index].to(output.dtype) * getattr(target, "embed_scale", 1.0)
        return torch.where(is_prompt.unsqueeze(-1), vectors.to(output.dtype), output)

    # A file holds the vectors once, at the first of the embeddings.
    def saved_state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.shared.saved() if "shared" in self._modules else {}
        return found

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        if "shared" in self._modules:
            self.shared.load(state)

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
