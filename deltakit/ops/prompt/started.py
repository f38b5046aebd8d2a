"""StartedPrompt: what methods share whose prompt starts as given vectors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from deltakit.core import Target, checked
from deltakit.errors import OptionError
from deltakit.ops.prompt.method import PromptMethod
from deltakit.ops.prompt.start_vectors import repeated, start_vectors

T = TypeVar("T", bound="StartedPrompt")


@runtime_checkable
class HasPrompt(Protocol):
    """What a handle is here."""

    _in_words: ClassVar[str] = "a delta with a soft prompt, such as attach and load return"

    def state_dict(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class StartedPrompt(PromptMethod):
    """A prompt that starts as embeddings of tokens, as random numbers, or as the vectors of another prompt.

    Args:
        init: "vocab" (embeddings of frequent tokens), "random", or a delta whose soft prompt it starts as, repeated or cut to
            the length of the prompt.
        init_range: random vectors are uniform within this distance of 0; above 0.
        init_ids: the token ids of a text to start from, repeated or cut to the length of the prompt.
        init_vectors: vectors [n, d] to start from, repeated or cut to the length of the prompt. Not in files.

    Raises:
        OptionError: if an option is out of its range.
    """

    init: str | HasPrompt = "vocab"
    init_range: float = 0.5
    init_ids: Sequence[int] | None = None
    init_vectors: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    @checked
    def from_text(cls: type[T], text: str, tokenizer: Callable[..., Any], **options: Any) -> T:
        """Returns a prompt that starts as the embeddings of a text. It is as long as the text unless `tokens` is given.

        Args:
            tokenizer: the backbone's tokenizer, such as transformers' `AutoTokenizer` returns.
            options: further options of the method.

        Raises:
            OptionError: if the text has no tokens, the tokenizer returns no ids, or an option is out of its range.
        """
        try:
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:
            what = f"the tokenizer raised {type(error).__name__}: {error}; pass the backbone's tokenizer"
            raise OptionError(f"{cls.__name__}.from_text: {what}") from error
        return cls(**{"tokens": max(1, len(ids)), "init_ids": ids, **options})

    @classmethod
    @checked
    def from_delta(cls: type[T], delta: HasPrompt, **options: Any) -> T:
        """Returns a prompt that starts as the one of another delta. It is as long as that one unless `tokens` is given.

        Args:
            delta: a delta with a soft prompt of any method, attached or not.
            options: further options of the method.

        Raises:
            OptionError: if the delta has no prompt or several, or an option is out of its range.
        """
        found = _prompt_of(delta, f"{cls.__name__}.from_delta")
        return cls(**{"tokens": len(found), "init_vectors": found, **options})

    def validate(self) -> None:
        super().validate()
        kind = type(self).__name__
        if not isinstance(self.init, str):
            if self.init_vectors is not None:
                raise OptionError(f"{kind}(init=..., init_vectors=...): omit one of the two")
            object.__setattr__(self, "init_vectors", _prompt_of(self.init, f"{kind}(init=...)"))
            object.__setattr__(self, "init", "vocab")
        if self.init not in ("vocab", "random"):
            what = f"expected 'vocab' or 'random'; for a text use {kind}.from_text"
            raise OptionError(f"{kind}(init={self.init!r}): {what}")
        if not self.init_range > 0:
            raise OptionError(f"{kind}(init_range={self.init_range}): expected a number above 0; 0.5 is usual")
        if self.init_ids is not None:
            if not self.init_ids or min(self.init_ids) < 0:
                raise OptionError(
                    f"{kind}(init_ids={list(self.init_ids)}): expected a list of at least one token id, none below 0"
                )
            object.__setattr__(self, "init_ids", tuple(self.init_ids))
        given = self.init_vectors
        if given is not None and (given.ndim != 2 or not given.shape[0] or not given.is_floating_point()):
            raise OptionError(
                f"{kind}(init_vectors=...): expected a matrix [n, d] with at least one row, found shape {tuple(given.shape)} "
                f"of {given.dtype}"
            )
        if given is not None and not given.isfinite().all():
            raise OptionError(f"{kind}: the vectors to start from have values that are infinite or not a number")
        if given is not None and self.init_ids is not None:
            raise OptionError(f"{kind}(init_ids=..., init_vectors=...): omit one of the two")

    def start_at(self, target: Target) -> Float[Tensor, "tokens d"]:
        """Returns the vectors with which the prompt at an embedding starts.

        Raises:
            OptionError: if an id is beyond the vocabulary, or the vectors have another width than the embedding.
        """
        if self.init_vectors is not None:
            return repeated(target, self.init_vectors, self.tokens, f"{type(self).__name__}(init_vectors=...)")
        within = self.init_range if self.init == "random" else None
        word = f"{type(self).__name__}(init_ids=...)"
        return start_vectors(target, self.tokens, within=within, init_ids=self.init_ids, option=word)

    def to_dict(self) -> dict[str, Any]:
        # A file has the prompt itself, so nobody needs what it started from.
        data = super(StartedPrompt, replace(self, init_vectors=None)).to_dict()
        del data["init_vectors"]
        return data


def _prompt_of(delta: HasPrompt, where: str) -> Float[Tensor, "tokens d"]:
    """Returns a copy of the prompt of a delta.

    Raises:
        OptionError: if it has no prompt or several.
    """
    found = [value for name, value in delta.state_dict().items() if name.endswith(".prompt")]
    if len(found) != 1:
        raise OptionError(
            f"{where}: expected a delta with one soft prompt, found {len(found)} of them; pass the vectors with init_vectors="
        )
    return found[0].clone()
