"""The wrapper for causal language models."""

from typing import Any, ClassVar

from deltakit.errors import OptionError, warn
from deltakit.openprompt.plms.utils import TokenizerWrapper
from deltakit.openprompt.prompt_base import WrappedPiece
from deltakit.prompting import Encoded, Kind


class LMTokenizerWrapper(TokenizerWrapper):
    """For GPT-2, OPT and others: the slot follows the text, so words behind it are left out."""

    kind: ClassVar[Kind] = "causal"

    def used(self, pieces: list[WrappedPiece]) -> list[WrappedPiece]:
        return up_to_slot(pieces, type(self).__name__)

    def padded(self, ids: dict[str, list[int]], encoded: Encoded) -> dict[str, Any]:
        return {**self.padded_in_text(ids, encoded), "input_ids_len": len(ids["input_ids"])}


def up_to_slot(pieces: list[WrappedPiece], where: str) -> list[WrappedPiece]:
    """Returns the pieces up to the first slot. A warning says if fields of the example stand behind it.

    Raises:
        OptionError: if there is no slot.
    """
    slot = next((place for place, piece in enumerate(pieces) if piece["loss_ids"] == 1), None)
    if slot is None:
        raise OptionError(f'{where}: the example has no slot; write {{"mask"}} in its template')
    behind = pieces[slot + 1 :]
    if any(piece["shortenable_ids"] or piece["loss_ids"] for piece in behind):
        warn(f"{where}: {''.join(piece['text'] for piece in behind)!r} stands behind the slot and has no effect")
    return pieces[: slot + 1]
