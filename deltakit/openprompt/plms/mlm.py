"""The wrapper for masked language models."""

from typing import Any, ClassVar

from deltakit.openprompt.plms.utils import TokenizerWrapper
from deltakit.prompting import Encoded, Kind


class MLMTokenizerWrapper(TokenizerWrapper):
    """For BERT, RoBERTa and others: the slot is the mask token."""

    kind: ClassVar[Kind] = "mlm"

    def padded(self, ids: dict[str, list[int]], encoded: Encoded) -> dict[str, Any]:
        slots = [int(place in encoded.slots) for place in range(self.max_seq_length)]
        types = {"token_type_ids": [0] * self.max_seq_length} if self.create_token_type_ids else {}
        return {**self.features(ids), **types, "loss_ids": slots}
