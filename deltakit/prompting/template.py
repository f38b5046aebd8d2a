"""Template: turns an example into the ids of a text with slots, in which the backbone predicts words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.methods.soft_prompt import SoftPrompt
from deltakit.ops import PromptMethod
from deltakit.prompting.backbone_facts import Kind, longest_input, refuse_slow
from deltakit.prompting.collating import Encoded, batch_of, labels_of
from deltakit.prompting.explanation import ExplainedToken, Explanation
from deltakit.prompting.markers import find_markers
from deltakit.prompting.pieces import Field, Slot
from deltakit.prompting.rendering import Rendered, render
from deltakit.prompting.soft_tokens import numbered
from deltakit.prompting.syntax import parse
from deltakit.prompting.template_checks import check_filters, check_positions, check_slots, first_soft_id, known_kind
from deltakit.prompting.tokens import Token, tokenized
from deltakit.prompting.truncation import Truncate, deleted

Example = Mapping[str, Any]
"""One example: a plain dict, or a row of a data set."""
Filters = Mapping[str, Callable[[str], str]]
_FREQUENT = 5_000
"""Soft tokens without words start as some of the first and most frequent tokens, as `SoftPrompt` does."""


class Template:
    """A text with places for the example's fields, and slots in which the backbone predicts words.

    Pieces in braces:

    - `{"placeholder": "text_a"}`: the example's field `text_a`. With `"shortenable": False` it is never truncated, and
      `"filter": "name"` sends the value through a function of `filters=`.
    - `{"meta": "entity"}`: the same for a field that is not truncated; it may also stand in `example["meta"]`.
    - `{"mask"}`: a slot.
    - `{"soft"}`: a trained vector. `{"soft": "words"}` starts as these words, one vector a token; `"duplicate": 5` makes five,
      with `"same": True` of one vector; pieces with one `"soft_id"` share their vectors.
    - `{"text": "...", "shortenable": True}`: text of the template that may be truncated.

    `{{` and `}}` are braces of the text.

    Args:
        text: the template.
        tokenizer: the backbone's fast tokenizer, as `AutoTokenizer.from_pretrained` returns.
        backbone: the language model. It is not kept. It may be omitted if `kind` is given and there are no soft tokens.
        kind: "mlm", "causal" or "seq2seq"; by default what the backbone's config, class or attention shows.
        max_length: the most tokens of an example, special ones included; by default what the tokenizer and the backbone take.
        truncate: what is deleted from examples that are longer: the last tokens of shortenable fields ("tail"), the first
            ones ("head"), or the last ones of the longest field in turn ("balanced").
        filters: functions for the values of fields, by the names that the template uses.

    Raises:
        OptionError: if the text is malformed, has no slot, several slots or text behind the slot where the kind allows none,
            names a filter that is not there, or is longer than `max_length` without any field; `max_length` is more than the
            backbone takes; or the tokenizer has no offsets, or no token for a slot.
        TargetError: if the kind of the backbone is unknown, or it has no embedding for soft tokens.
    """

    @checked
    def __init__(
        self,
        text: str,
        tokenizer: Any,
        backbone: nn.Module | None = None,
        *,
        kind: Kind | None = None,
        max_length: int | None = None,
        truncate: Truncate = "tail",
        filters: Filters | None = None,
    ) -> None:
        refuse_slow(tokenizer)
        self.text, self.tokenizer = text, tokenizer
        self.kind: Kind = kind or known_kind(backbone)
        self.truncate: Truncate = truncate
        self.filters = dict(filters or {})
        self.pieces = tuple(parse(text))
        self._soft = numbered(self.pieces, tokenizer)
        check_slots(self.pieces, self.kind)
        check_filters(self.pieces, self.filters)
        self._markers = find_markers(tokenizer, self.kind, self.num_slots, soft=self.num_soft > 0)
        check_positions(max_length, backbone)
        self.max_length = max_length if max_length is not None else longest_input(backbone, tokenizer)
        self.first_soft = first_soft_id(backbone) if self.num_soft else 0
        config = getattr(backbone, "config", None)
        start = getattr(config, "decoder_start_token_id", None)
        self._start = start if start is not None else tokenizer.pad_token_id
        self._check_length()

    @property
    def fields(self) -> list[str]:
        """The names of the fields that an example must have."""
        return list(dict.fromkeys(piece.name for piece in self.pieces if isinstance(piece, Field)))

    @property
    def num_slots(self) -> int:
        """The number of slots."""
        return sum(isinstance(piece, Slot) for piece in self.pieces)

    @property
    def num_soft(self) -> int:
        """The number of trained vectors, which `soft_prompt` makes."""
        return len(self._soft.starts)

    @property
    def in_decoder(self) -> bool:
        """Whether the slots are predicted behind sentinels in the decoder's text, as by T5."""
        return self._markers.in_decoder

    @property
    def mask_id(self) -> int | None:
        """The id of the mask token in the slots; None where the word follows the text or a sentinel."""
        return None if self.in_decoder or not self._markers.slots else self._markers.slots[0].id

    @property
    def marker_ids(self) -> list[int]:
        """The ids of the special tokens in its slots."""
        return [marker.id for marker in self._markers.slots]

    @checked
    def soft_prompt(self, method: type[PromptMethod] = SoftPrompt, **options: Any) -> PromptMethod:
        """Returns the method whose vectors are the soft tokens: `dk.attach(model, template.soft_prompt())`.

        Args:
            method: `SoftPrompt`, `PTuning` or another method of prompts.
            options: further options of the method.

        Raises:
            OptionError: if the template has no soft tokens, or an option does not fit.
        """
        if not self.num_soft:
            raise OptionError('soft_prompt: the template has no soft tokens; write {"soft"} in it')
        mine = {"tokens": self.num_soft, "prepend": False}
        for name in mine.keys() & options.keys():
            raise OptionError(f"soft_prompt({name}=...): the template says this option; omit it")
        if issubclass(method, SoftPrompt) and not options.keys() & {"init", "init_ids", "init_vectors"}:
            frequent = torch.randint(min(_FREQUENT, self.first_soft), (self.num_soft,)).tolist()
            pairs = zip(self._soft.starts, frequent, strict=True)
            options["init_ids"] = [other if start is None else start for start, other in pairs]
        return method(**{**mine, **options})

    @checked
    def render(self, example: Example) -> str:
        """Returns the text of an example as it is tokenized, before truncation. Special tokens mark slots and soft tokens.

        Raises:
            OptionError: if a field is missing, or is no text.
        """
        return self._rendered(example).text

    @checked
    def encode(self, example: Example) -> Encoded:
        """Returns the ids of one example, and where its slots are in the backbone's logits.

        Raises:
            OptionError: if a field is missing or no text, what may not be truncated is longer than `max_length`, or nothing
                stands ahead of the slot of a causal template.
        """
        return self._encoded([example])[0]

    def _encoded(self, examples: Sequence[Example]) -> list[Encoded]:
        return [self._without_deleted(tokens) for tokens in self._tokens(examples)]

    def _without_deleted(self, tokens: Sequence[Token]) -> Encoded:
        cut = deleted(tokens, self.max_length, self.truncate)
        kept = [token for place, token in enumerate(tokens) if place not in cut]
        ids = [self.first_soft + token.number if token.kind == "soft" else token.id for token in kept]
        types = [token.type_id for token in kept] if "token_type_ids" in self.tokenizer.model_input_names else None
        if self.kind == "causal":
            return Encoded(ids, [len(ids) - 1], types)
        if self._markers.in_decoder:
            sentinels = [marker.id for marker in self._markers.slots]
            return Encoded(ids, list(range(1, len(sentinels) + 1)), types, [self._start, *sentinels])
        return Encoded(ids, [place for place, token in enumerate(kept) if token.kind == "slot"], types)

    @checked
    def collate(self, examples: Sequence[Example], *, classes: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Returns the batch of some examples, as a `data_collator` does: what `PromptModel` takes as keywords.

        `input_ids`, `attention_mask` and what else the tokenizer makes are [batch, length]; `slots` [batch, slots] are
        positions in the backbone's logits. If the examples have a field "label" (an index), there are `labels` [batch].

        Args:
            classes: the names that labels may also be written as.

        Raises:
            OptionError: as `encode` does, and if there are no examples, or labels do not fit.
        """
        if not examples:
            raise OptionError("collate: expected at least one example, found none")
        padding = getattr(self.tokenizer, "pad_token_id", None)
        # The mask hides padding, whatever its id.
        found = batch_of(self._encoded(examples), 0 if padding is None else padding)
        labels = labels_of(examples, classes)
        return found if labels is None else {**found, "labels": labels}

    @checked
    def explain(self, example: Example) -> Explanation:
        """Returns the tokens of an example, colored by their kind, with those that truncation deletes. `print` shows it.

        Raises:
            OptionError: as `encode` does.
        """
        tokens = self._tokens([example])[0]
        cut = deleted(tokens, self.max_length, self.truncate)
        words = self.tokenizer.convert_ids_to_tokens([token.id for token in tokens])
        shown = [
            ExplainedToken(f"soft {token.number}" if token.kind == "soft" else str(word), token.kind, place in cut)
            for place, (word, token) in enumerate(zip(words, tokens, strict=True))
        ]
        return Explanation(shown, self.max_length, self.truncate)

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as plain data, for files. Of filters there are only the names, which stand in the text."""
        return {"text": self.text, "kind": self.kind, "max_length": self.max_length, "truncate": self.truncate}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Template":
        # Nothing in it changes, and its tokenizer is large.
        return self

    def _rendered(self, example: Example) -> Rendered:
        found = render(self.pieces, example, self._markers, self._soft.numbers, self.filters)
        if self.kind == "causal":
            # The space belongs to the word that follows: " yes" is one token.
            found.strip_end()
        return found

    def _tokens(self, examples: Sequence[Example]) -> list[list[Token]]:
        found = tokenized([self._rendered(example) for example in examples], self.tokenizer)
        if self.kind == "causal":
            for tokens in found:
                # What tokenizers add behind a text, such as an end mark, would stand between it and the predicted word.
                while tokens and tokens[-1].kind == "special" and any(token.kind != "special" for token in tokens):
                    tokens.pop()
                if not tokens:
                    tokens.append(self._first_token())
        return found

    def _first_token(self) -> Token:
        names = ("bos_token_id", "eos_token_id")
        one = next((i for i in (getattr(self.tokenizer, name, None) for name in names) if i is not None), None)
        if one is None:
            raise OptionError(
                "Template: nothing stands ahead of the slot, because all fields are empty, and the tokenizer has no token for "
                "the start of a text; write some words ahead of the slot"
            )
        return Token(one, "special")

    def _check_length(self) -> None:
        """Refuses a template that is too long for any example. `fixed_ids` are then the ids of an example of empty texts.

        Raises:
            OptionError: if it is.
        """
        if self.max_length is not None and self.max_length < 1:
            raise OptionError(f"Template(max_length={self.max_length}): expected at least 1")
        plain = dict.fromkeys(self.filters, _same)
        found = render(self.pieces, dict.fromkeys(self.fields, ""), self._markers, self._soft.numbers, plain)
        tokens = tokenized([found], self.tokenizer)[0]
        self.fixed_ids = tuple(token.id for token in tokens if token.kind != "soft")
        needed = sum(not token.shortenable for token in tokens)
        if self.max_length is not None and needed > self.max_length:
            raise OptionError(
                f"Template: it has {needed} tokens without any field, and max_length is {self.max_length}; write a shorter "
                "one, or pass a larger max_length"
            )


def _same(text: str) -> str:
    return text
