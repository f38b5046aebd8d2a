"""LM-BFF's templates: a filler such as T5 writes the words between a text and its label word.

Gao et al. 2021, https://arxiv.org/abs/2012.15723, section 5.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError, TargetError
from deltakit.prompting.backbone_facts import embedding_of, refuse_slow
from deltakit.prompting.collating import labels_of
from deltakit.prompting.evaluating import evaluating
from deltakit.prompting.pieces import Piece, Slot, Soft, Text
from deltakit.prompting.rendering import value_of
from deltakit.prompting.searching.beams import Beam, best_fillings
from deltakit.prompting.searching.scoring import check_examples
from deltakit.prompting.searching.writing import written
from deltakit.prompting.syntax import parse
from deltakit.prompting.template import Example


class GeneratedTemplate(NamedTuple):
    """The text of a template, and the log-probability that the filler gives its words, summed over the examples."""

    text: str
    log_probability: float


@checked
def generate_templates(
    filler: nn.Module,
    tokenizer: Any,
    layout: str,
    words: Mapping[str, str],
    examples: Sequence[Example],
    *,
    beams: int = 8,
    most_tokens: int = 6,
    forwards: int = 2_000,
    batch_size: int = 32,
) -> list[GeneratedTemplate]:
    """Returns templates that an encoder-decoder writes, the most probable first (LM-BFF). Nothing is trained or changed.

    The filler gets each example with its label word in the slot and gaps in the places of the layout's soft pieces. A beam
    search finds the words for the gaps with the highest sum of log-probabilities over all examples. Score the templates on
    examples of your own with `score_templates`: what the filler finds probable need not be what serves.

    `generate_templates(t5, tokenizer, '{"placeholder": "text"} {"soft"} {"mask"} {"soft"}', {"good": "great", ...}, examples)`

    Args:
        filler: an encoder-decoder that fills gaps behind sentinels, such as T5. It need not be the backbone.
        tokenizer: the filler's tokenizer, with the sentinels `<extra_id_0>` and so on.
        layout: a template with one slot; each soft piece is a gap.
        words: for each class its label word.
        examples: dicts with the layout's fields and a "label", an index or the name of a class.
        beams: how many templates are searched, and returned at most.
        most_tokens: the most tokens of a gap.
        forwards: the most calls of the filler's decoder.
        batch_size: how many examples the filler gets at once.

    Raises:
        OptionError: if the layout has no gap, not one slot, or more gaps than the tokenizer has sentinels; there are no
            labelled examples; or no template was complete within the budget.
        TargetError: if the filler is no encoder-decoder.
    """
    check_examples(examples, batch_size, "generate_templates")
    for name, value in (("beams", beams), ("most_tokens", most_tokens), ("forwards", forwards)):
        if value < 1:
            raise OptionError(f"generate_templates({name}={value}): expected at least 1")
    refuse_slow(tokenizer)
    if not getattr(getattr(filler, "config", None), "is_encoder_decoder", False):
        raise TargetError(
            f"generate_templates: {type(filler).__name__} is no encoder-decoder, so it fills no gaps; pass a model such as T5"
        )
    pieces = parse(layout)
    gaps = [place for place, piece in enumerate(pieces) if isinstance(piece, Soft)]
    sentinels = _sentinels(tokenizer, pieces, len(gaps))
    labels = labels_of(examples, list(words))
    assert labels is not None
    own = [list(words.values())[label] for label in labels.tolist()]
    texts = [_text(pieces, example, word) for example, word in zip(examples, own, strict=True)]
    with torch.no_grad(), evaluating(filler):
        asked = Filler(filler, tokenizer, texts, batch_size)
        special, questions = tokenizer.all_special_ids, forwards // asked.batches
        found = best_fillings(asked.next_words, sentinels, asked.ends, special, beams, most_tokens, questions)
    if not found:
        raise OptionError(
            f"generate_templates(forwards={forwards}): no template was complete by then; pass more, or fewer beams={beams}"
        )
    return _templates(pieces, gaps, found, tokenizer)


def _templates(
    pieces: Sequence[Piece], gaps: Sequence[int], found: Sequence[Beam], tokenizer: Any
) -> list[GeneratedTemplate]:
    best: dict[str, float] = {}
    for beam in found:
        filled = [tokenizer.decode(list(gap)).strip() for gap in beam.gaps]
        best.setdefault(written(pieces, dict(zip(gaps, filled, strict=True))), beam.score)
    return [GeneratedTemplate(text, score) for text, score in best.items()]


def _sentinels(tokenizer: Any, pieces: Sequence[Piece], gaps: int) -> list[int]:
    slots = sum(isinstance(piece, Slot) for piece in pieces)
    if not gaps or slots != 1:
        raise OptionError(
            f"generate_templates: expected a layout with one slot and at least one gap, found {slots} and {gaps}; write such "
            'as \'{"placeholder": "text"} {"soft"} {"mask"} {"soft"}\''
        )
    # One more than gaps ends the last one.
    names = [f"<extra_id_{number}>" for number in range(gaps + 1)]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    unknown = getattr(tokenizer, "unk_token_id", None)
    for name, one in zip(names, ids, strict=True):
        if one is None or one == unknown:
            raise OptionError(
                f"generate_templates: the tokenizer has no sentinel {name}, and {gaps} gaps need {gaps + 1} of them; pass a "
                "filler such as T5 with its tokenizer, or a layout with fewer gaps"
            )
    return ids


def _text(pieces: Sequence[Piece], example: Example, word: str) -> str:
    found, gap = "", 0
    for piece in pieces:
        if isinstance(piece, Soft):
            # As in the corruption of texts that T5 was trained on: no space of its own ahead of a sentinel.
            found, gap = f"{found.rstrip(' ')}<extra_id_{gap}>", gap + 1
        elif isinstance(piece, Slot):
            found += word
        else:
            found += piece.text if isinstance(piece, Text) else value_of(example, piece, {})
    return found


class Filler:
    """Asks a filler for the next words of its fillings, of all examples together. `batches` calls answer one question."""

    def __init__(self, filler: Any, tokenizer: Any, texts: Sequence[str], size: int) -> None:
        self.filler = filler
        device = embedding_of(filler).weight.device
        self.start = filler.config.decoder_start_token_id
        self.ends = {tokenizer.eos_token_id} - {None}
        self.encoded: list[tuple[Any, Tensor]] = []
        for first in range(0, len(texts), size):
            batch = tokenizer(list(texts[first : first + size]), padding=True, return_tensors="pt").to(device)
            mask = batch["attention_mask"]
            self.encoded.append((filler.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask), mask))
        self.batches = len(self.encoded)

    def next_words(self, ids: Sequence[int]) -> Tensor:
        """Returns the log-probabilities of all tokens behind some ids [vocabulary], summed over the examples."""
        total: Tensor | None = None
        for encoded, mask in self.encoded:
            given = torch.tensor([[self.start, *ids]] * len(mask), device=mask.device)
            output = self.filler(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=given, use_cache=False)
            found = output.logits[:, -1].float().log_softmax(-1).sum(0)
            total = found if total is None else total + found
        assert total is not None
        return total
