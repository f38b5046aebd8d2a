"""The wrappers for T5."""

from typing import Any, ClassVar

from deltakit.openprompt.plms.lm import up_to_slot
from deltakit.openprompt.plms.utils import TokenizerWrapper
from deltakit.openprompt.prompt_base import WrappedPiece
from deltakit.prompting import Encoded, Kind


class T5TokenizerWrapper(TokenizerWrapper):
    """For T5 and BART. T5: slots are sentinels in the encoder's text, and the decoder's text is `<pad> <extra_id_0> ...`."""

    kind: ClassVar[Kind] = "seq2seq"

    def padded(self, ids: dict[str, list[int]], encoded: Encoded) -> dict[str, Any]:
        if encoded.decoder_input_ids is None:
            # BART has a mask token in the encoder's text.
            return self.padded_in_text(ids, encoded)
        return {**self.features(ids), **self.decoder_features(encoded.decoder_input_ids, encoded.slots)}

    def decoder_features(self, decoder: list[int], slots: list[int]) -> dict[str, list[int]]:
        """Returns the padded ids of the decoder's text, and where the slots are in it."""
        length = max(self.decoder_max_length, len(decoder))
        return {
            "decoder_input_ids": self.filled(decoder, length, self.tokenizer.pad_token_id),
            "loss_ids": [int(place in slots) for place in range(length)],
        }


class T5LMTokenizerWrapper(T5TokenizerWrapper):
    """For T5 that was adapted to language modelling.

    The encoder's text ends at the slot, and the decoder's is `<pad> <extra_id_0> </s>`.
    """

    kind: ClassVar[Kind] = "causal"
    added: ClassVar[int] = 1

    def used(self, pieces: list[WrappedPiece]) -> list[WrappedPiece]:
        return up_to_slot(pieces, type(self).__name__)

    def padded(self, ids: dict[str, list[int]], encoded: Encoded) -> dict[str, Any]:
        end = self.tokenizer.eos_token_id
        whole = {name: [*own, end if name == "input_ids" else 0] for name, own in ids.items()}
        sentinel = self.tokenizer.convert_tokens_to_ids("<extra_id_0>")
        decoder = [self.tokenizer.pad_token_id, sentinel, end]
        return {**self.features(whole), **self.decoder_features(decoder, [1])}
