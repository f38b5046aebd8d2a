"""PromptMethod: what all methods share whose trained vectors are among the input embeddings."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Method, Target
from deltakit.errors import OptionError, TargetError
from deltakit.ops.prompt.delta_modules import InsertPromptDelta, PromptMaskDelta, PromptVectors, PromptVectorsDelta
from deltakit.ops.prompt.insertion import Insertion
from deltakit.ops.prompt.text_stack import input_embeddings, stack_at, text_stack


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method):
    """A trained prompt among the input embeddings. A subclass says how its vectors start, or what computes them.

    Args:
        tokens: the number of trained vectors, at least 1.
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
    prepend: bool = True
    where: str | None = None
    trim: bool = True

    identity: ClassVar[bool] = False
    computed_in_files: ClassVar[bool] = False
    """Whether a file holds the tensors of the module that computes the vectors, instead of the vectors."""

    @abstractmethod
    def start(self, target: Target) -> Float[Tensor, "tokens d"] | nn.Module:
        """Returns the vectors with which the prompt at an embedding starts, or a module without arguments that computes them.

        Raises:
            OptionError: if an option does not fit the embedding.
        """

    @property
    def length(self) -> int:
        """The length of the prompt in tokens."""
        return self.tokens

    def validate(self) -> None:
        kind = type(self).__name__
        if self.tokens < 1:
            raise OptionError(f"{kind}(tokens={self.tokens}): expected at least 1")
        if self.where not in (None, "start", "after_first"):
            raise OptionError(f"{kind}(where={self.where!r}): expected 'start', 'after_first' or None")

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        embeddings = [path for group in input_embeddings(index) for path in group]
        for target in selected or ():
            if target.path not in embeddings:
                found = type(target.module).__name__
                inside = [path for path in embeddings if path.startswith(f"{target.path}.")]
                raise TargetError(
                    f"{target.named}: {self.name} expects the embedding of the input ids, found a {found}; omit at=, or write "
                    f"at={(inside or embeddings)[0]!r}"
                )
        return [index.target(path) for path in embeddings] if selected is None else selected

    def kind_at(self, target: Target) -> type[DeltaModule]:
        return PromptVectorsDelta

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        """Returns the delta modules at the embeddings and, with `prepend`, at the text stacks and their decoders, if any.

        Raises:
            TargetError: if `prepend` is set and no module around an embedding accepts `input_ids`.
            OptionError: if an option does not fit an embedding.
        """
        built: dict[str, DeltaModule] = {}
        for group in input_embeddings(index):
            own = [target for target in targets if target.path in group]
            built |= self._build_in_model(index, group, own) if own else {}
        return built

    def _build_in_model(
        self, index: BackboneView, group: Sequence[str], targets: Sequence[Target]
    ) -> dict[str, DeltaModule]:
        vectors = PromptVectors(self.start(targets[0]), in_files=self.computed_in_files)
        vocabulary = int(targets[0].module.num_embeddings)  # type: ignore[arg-type]
        built: dict[str, DeltaModule] = {}
        for target in targets:
            built[target.path] = PromptVectorsDelta(self.length, vocabulary, inserted=self.prepend)
            built[target.path].share(vectors, holds=len(built) == 1)
        if self.prepend:
            stack, decoder = text_stack(index, group)
            at = self._tokens_before(index, stack)
            encodes = decoder is not None
            known = stack_at(index, stack, at)
            insertion = Insertion(vocabulary, self.length, at, known, self.trim and not encodes, encodes)
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
