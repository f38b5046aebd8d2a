"""Templates with trained vectors between their words."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.openprompt.prompt_base import Template, WrappedPiece
from deltakit.openprompt.prompts.decoder_text import needs_decoder_text, one_later
from deltakit.prompting import Soft, embedding_of, soft_tokens


class MixedTemplate(Template):
    """A template of words, fields, slots and trained vectors.

    `{"soft"}`, `{"soft": "words"}`, `"duplicate"`, `"same"` and `"soft_id"` are those of `deltakit.prompting.Template`. The
    vectors are `soft_embedding.weight` [1 + vectors, d], whose first row is not used. Words start as their embeddings. BART's
    decoder reads the same vectors where it reads the encoder's text.

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
        # In a list: they are no part of the template. And first: setting the text reads them.
        self._model, self._embedding = [model], [embedding_of(model)]
        super().__init__(tokenizer, text, placeholder_mapping, filters)

    def on_text_set(self) -> None:
        self._numbers, self._starts = soft_tokens(self.pieces, self.tokenizer)
        weight = self._embedding[0].weight
        self.soft_embedding = nn.Embedding(1 + len(self._starts), weight.shape[1]).to(weight)
        with torch.no_grad():
            for number, start in enumerate(self._starts):
                if start is not None:
                    # By a call: the embeddings of some models are scaled in it.
                    self.soft_embedding.weight[number + 1] = self._embedding[0](
                        torch.tensor(start, device=weight.device)
                    )

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
        batch["inputs_embeds"] = self._embedded(ids, soft)
        if needs_decoder_text(self._model[0], batch):
            # Vectors have ids of their own behind the vocabulary while the text is shifted.
            first = self._embedding[0].num_embeddings
            later = one_later(self._model[0], torch.where(soft > 0, first + soft, ids))
            own = (later - first).clamp_min(0)
            batch["decoder_inputs_embeds"] = self._embedded(later.masked_fill(own > 0, 0), own)
        return batch

    def _embedded(self, ids: Tensor, soft: Tensor) -> Tensor:
        return torch.where((soft > 0)[..., None], self.soft_embedding(soft), self._embedding[0](ids))
