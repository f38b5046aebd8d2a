"""Templates with trained vectors between their words."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from deltakit.core import checked
from deltakit.openprompt.prompt_base import Template, WrappedPiece
from deltakit.prompting import Soft, embedding_of, soft_tokens


class MixedTemplate(Template):
    """A template of words, fields, slots and trained vectors.

    `{"soft"}`, `{"soft": "words"}`, `"duplicate"`, `"same"` and `"soft_id"` are those of `deltakit.prompting.Template`. The
    vectors are `soft_embedding.weight` [1 + vectors, d], whose first row is not used. Words start as their embeddings.

    Args:
        model: the backbone, for its embedding.
        tokenizer, text, placeholder_mapping, filters: as of `Template`.
    """

    registered_inputflag_names: ClassVar = ("soft_token_ids", "loss_ids", "shortenable_ids")

    @checked
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str | None = None,
        placeholder_mapping: Mapping[str, str] | None = None,
        filters: Mapping[str, Callable[[str], str]] | None = None,
    ) -> None:
        # In a list: it is no part of the template. And first: setting the text reads it.
        self._embedding = [embedding_of(model)]
        super().__init__(tokenizer, text, placeholder_mapping, filters)

    def on_text_set(self) -> None:
        self._numbers, self._starts = soft_tokens(self.pieces, self.tokenizer)
        weight = self._embedding[0].weight
        self.soft_embedding = nn.Embedding(1 + len(self._starts), weight.shape[1]).to(weight)
        with torch.no_grad():
            for number, start in enumerate(self._starts):
                if start is not None:
                    self.soft_embedding.weight[number + 1] = weight[start]

    def soft_pieces(self, index: int, piece: Soft) -> list[WrappedPiece]:
        found = []
        for number in self._numbers[index]:
            start = self._starts[number]
            text = "" if start is None else self.tokenizer.convert_ids_to_tokens(start)
            found.append(self._flagged(text, soft=number + 1))
        return found

    def process_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = dict(batch)
        ids, soft = batch.pop("input_ids"), batch.pop("soft_token_ids")
        words, own = self._embedding[0](ids), self.soft_embedding(soft)
        return {**batch, "inputs_embeds": torch.where((soft > 0)[..., None], own, words)}
