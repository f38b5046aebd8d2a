"""Trained vectors ahead of a template of words: prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.openprompt.prompt_base import Template
from deltakit.openprompt.prompts.decoder_text import needs_decoder_text, one_later
from deltakit.prompting import embedding_of


class SoftTemplate(Template):
    """Trained vectors `soft_embeds` [num_tokens, d] ahead of a template of words; of encoder-decoders in the encoder alone.

    Args:
        model: the backbone, for its embedding. It is not frozen, as OpenPrompt does with it.
        tokenizer, text, placeholder_mapping, filters: as of `Template`.
        soft_embeds: their start values; by default the embeddings of the first tokens of the vocabulary.
        num_tokens: how many there are.
        initialize_from_vocab: False starts from uniform numbers in [-random_range, random_range].
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str | None = None,
        soft_embeds: Tensor | None = None,
        num_tokens: int = 20,
        initialize_from_vocab: bool = True,
        random_range: float = 0.5,
        placeholder_mapping: Mapping[str, str] | None = None,
        filters: Mapping[str, Callable[[str], str]] | None = None,
    ) -> None:
        super().__init__(tokenizer, text, placeholder_mapping, filters)
        # In a list: they are no part of the template.
        self._model, self._embedding = [model], [embedding_of(model)]
        self._ahead_of_scores = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if soft_embeds is None:
            weight = self._embedding[0].weight
            with torch.no_grad():
                # By a call: the embeddings of some models are scaled in it.
                first = self._embedding[0](torch.arange(min(num_tokens, len(weight)), device=weight.device))
            soft_embeds = first.detach().clone()
            if not initialize_from_vocab:
                soft_embeds.uniform_(-random_range, random_range)
        self.soft_embeds = nn.Parameter(soft_embeds)

    @property
    def num_tokens(self) -> int:
        """How many vectors there are."""
        return len(self.soft_embeds)

    def process_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = dict(batch)
        ids = batch.pop("input_ids")
        words = self._embedding[0](ids)
        own = self.soft_embeds.to(words.dtype).expand(len(words), -1, -1)
        batch["inputs_embeds"] = torch.cat([own, words], 1)
        mask = batch.get("attention_mask")
        if mask is not None:
            batch["attention_mask"] = torch.cat([mask.new_ones(own.shape[:2]), mask], 1)
        if needs_decoder_text(self._model[0], batch):
            batch["decoder_input_ids"] = one_later(self._model[0], ids)
        return batch

    @property
    def added_positions(self) -> int:
        return self.num_tokens if self._ahead_of_scores else 0
