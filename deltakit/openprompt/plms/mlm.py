"""The wrapper for masked language models."""

from typing import Any, ClassVar

from deltakit.openprompt.plms.utils import TokenizerWrapper
from deltakit.prompting import Encoded, Kind


class MLMTokenizerWrapper(TokenizerWrapper):
    """For BERT, RoBERTa and others: the slot is the mask token."""

    kind: ClassVar[Kind] = "mlm"

    def padded(self, ids: dict[str, list[int]], encoded: Encoded) -> dict[str, Any]:
        return self.padded_in_text(ids, encoded)
