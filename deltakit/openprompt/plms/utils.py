"""The base of tokenizer wrappers: they turn wrapped examples into ids."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.openprompt.prompt_base import SPECIAL, WrappedPiece
from deltakit.prompting import Encoded, Kind, Template

_LONGEST = 10**9


class TokenizerWrapper:
    """Turns wrapped examples into padded ids.

    The pieces are joined and tokenized at once. OpenPrompt tokenizes them one by one, and gets tokens that are in no text:
    "▁" and "." for the piece "." behind a word.

    Args:
        max_seq_length: the length of all examples, special tokens included.
        tokenizer: the backbone's fast tokenizer.
        truncate_method: "tail" deletes the last tokens of shortenable pieces, "head" the first ones, "balanced" the last ones
            of the longest piece in turn.
        decoder_max_length: the length of the decoder's text; it is longer where slots need it. -1 for what they need.
        decode_from_pad: as of OpenPrompt; only True is served.
        predict_eos_token: as of OpenPrompt; only False is served: it serves generation.
        create_token_type_ids: whether there are `token_type_ids`.

    Raises:
        OptionError: if the tokenizer has no offsets, or an option is not served.
    """

    kind: ClassVar[Kind]
    added: ClassVar[int] = 0
    """How many tokens `tokenize_one_example` adds to what its template encodes."""

    @checked
    def __init__(
        self,
        max_seq_length: int,
        tokenizer: Any,
        truncate_method: Literal["tail", "head", "balanced"] = "tail",
        decoder_max_length: int = -1,
        decode_from_pad: bool = True,
        predict_eos_token: bool = False,
        create_token_type_ids: bool = False,
    ) -> None:
        if not decode_from_pad or predict_eos_token:
            raise OptionError(
                f"{type(self).__name__}: decode_from_pad=False and predict_eos_token=True are not served, because they "
                "serve generation; call generate on the backbone"
            )
        self.max_seq_length, self.tokenizer = max_seq_length, tokenizer
        self.truncate_method: Literal["tail", "head", "balanced"] = truncate_method
        self.decoder_max_length, self.create_token_type_ids = decoder_max_length, create_token_type_ids
        self.num_truncated_sentences = self.total_passed_sentences = 0
        self._templates: dict[Any, Template] = {}

    @property
    def truncate_rate(self) -> float | None:
        """The share of examples that were truncated; None ahead of the first one."""
        passed = self.total_passed_sentences
        return self.num_truncated_sentences / passed if passed else None

    def tokenize_one_example(self, wrapped_example: Sequence[Any], teacher_forcing: bool = False) -> dict[str, Any]:
        """Returns the ids of a wrapped example, each a list: `input_ids`, `attention_mask`, `loss_ids` and others.

        Raises:
            OptionError: if it has no slot, what may not be truncated is too long, or `teacher_forcing` is True, which serves
                generation.
        """
        if teacher_forcing:
            raise OptionError(
                f"{type(self).__name__}: teacher_forcing=True is not served, because it serves generation; call the backbone "
                "with labels, and generate"
            )
        pieces = self.used(list(wrapped_example[0]))
        encoded, numbers = self._encoded(pieces)
        ids = {"input_ids": [0 if number else one for one, number in zip(encoded.input_ids, numbers, strict=True)]}
        if any("soft_token_ids" in piece for piece in pieces):
            ids["soft_token_ids"] = numbers
        return self.padded(ids, encoded)

    def used(self, pieces: list[WrappedPiece]) -> list[WrappedPiece]:
        """Returns the pieces that the encoder reads."""
        return pieces

    @abstractmethod
    def padded(self, ids: dict[str, list[int]], encoded: Encoded) -> dict[str, Any]:
        """Returns the features of an example from its ids without padding."""

    def padded_in_text(self, ids: Mapping[str, list[int]], encoded: Encoded) -> dict[str, Any]:
        """Returns the features of an example whose slots are in the encoder's text, or in the only one."""
        length = self.max_seq_length
        types = {"token_type_ids": [0] * length} if self.create_token_type_ids else {}
        return {**self.features(ids), **types, "loss_ids": [int(place in encoded.slots) for place in range(length)]}

    def filled(self, values: Sequence[int], length: int, padding: int | None = 0) -> list[int]:
        """Returns values with padding behind them."""
        return [*values, *[padding or 0] * (length - len(values))]

    def features(self, ids: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """Returns padded `input_ids`, and what goes with them."""
        length = self.max_seq_length
        found = {name: self.filled(own, length) for name, own in ids.items()}
        found["input_ids"] = self.filled(ids["input_ids"], length, self.tokenizer.pad_token_id)
        return {**found, "attention_mask": self.filled([1] * len(ids["input_ids"]), length)}

    def _encoded(self, pieces: Sequence[WrappedPiece]) -> tuple[Encoded, list[int]]:
        """Returns the encoded example, and for each of its ids the number of the soft token, or 0."""
        values = {str(place): self._text(piece["text"]) for place, piece in enumerate(pieces)}
        length = self.max_seq_length - self.added
        template = self._template(pieces, length)
        encoded = template.encode(values)
        self.total_passed_sentences += 1
        if len(encoded.input_ids) == length:
            self.num_truncated_sentences += len(self._template(pieces, _LONGEST).encode(values).input_ids) > length
        order = list(dict.fromkeys(own for own in (piece.get("soft_token_ids", 0) for piece in pieces) if own))
        first = template.first_soft
        return encoded, [order[one - first] if order and one >= first else 0 for one in encoded.input_ids]

    def _text(self, text: str) -> str:
        if text not in SPECIAL:
            return text
        found = getattr(self.tokenizer, f"{text[1:-1]}_token", None)
        if found is None:
            raise OptionError(
                f"{type(self).__name__}: the tokenizer has no token for {text}; leave it out of the template"
            )
        return str(found)

    def _template(self, pieces: Sequence[WrappedPiece], length: int) -> Template:
        """Returns the template in which each piece is a field: the same one for all examples of a template."""
        parts = []
        for place, piece in enumerate(pieces):
            if piece["loss_ids"] == 1:
                parts.append('{"mask"}')
            elif piece.get("soft_token_ids", 0):
                parts.append(f'{{"soft": None, "soft_id": {piece["soft_token_ids"]}}}')
            else:
                parts.append(f'{{"placeholder": "{place}", "shortenable": {bool(piece["shortenable_ids"])}}}')
        key = (length, *parts)
        if key not in self._templates:
            words = _Vocabulary(len(self.tokenizer))
            self._templates[key] = Template(
                "".join(parts), self.tokenizer, words, kind=self.kind, max_length=length, truncate=self.truncate_method
            )
        return self._templates[key]


class _Vocabulary(nn.Module):
    """Stands for a backbone whose size of the vocabulary is all that is known."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 1, device="meta")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding
