"""Template: turns an example into the ids of a text with slots, in which the backbone predicts words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from deltakit.core import checked
from deltakit.methods.soft_prompt import SoftPrompt
from deltakit.ops import PromptMethod
from deltakit.prompting.backbone_facts import Kind
from deltakit.prompting.explanation import Explanation

Example = Mapping[str, Any]
"""One example: a plain dict, or a row of a data set."""
Filters = Mapping[str, Callable[[str], str]]
Truncate = Literal["tail", "head", "balanced"]


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
            names a filter that is not there, or is longer than `max_length` without any field; or the tokenizer has no
            offsets, or no token for a slot.
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
        raise NotImplementedError

    @property
    def fields(self) -> list[str]:
        """The names of the fields that an example must have."""
        raise NotImplementedError

    @property
    def num_slots(self) -> int:
        """The number of slots."""
        raise NotImplementedError

    @property
    def num_soft(self) -> int:
        """The number of trained vectors, which `soft_prompt` makes."""
        raise NotImplementedError

    def soft_prompt(self, method: type[PromptMethod] = SoftPrompt, **options: Any) -> PromptMethod:
        """Returns the method whose vectors are the soft tokens: `dk.attach(model, template.soft_prompt())`.

        Args:
            method: `SoftPrompt`, `PTuning` or another method of prompts.
            options: further options of the method.

        Raises:
            OptionError: if the template has no soft tokens, or an option does not fit.
        """
        raise NotImplementedError

    def render(self, example: Example) -> str:
        """Returns the text of an example as it is tokenized, before truncation. Special tokens mark slots and soft tokens.

        Raises:
            OptionError: if a field is missing, or is no text.
        """
        raise NotImplementedError

    def encode(self, example: Example) -> "Encoded":
        """Returns the ids of one example, and where its slots are among them.

        Raises:
            OptionError: if a field is missing or no text, or what may not be truncated is longer than `max_length`.
        """
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Returns the batch of some examples, as a `data_collator` does: what `PromptModel` takes as keywords.

        `input_ids`, `attention_mask` and what else the tokenizer makes are [batch, length]; `slots` [batch, slots] are
        positions in the backbone's logits. If the examples have a field "label" (an index), there are `labels` [batch].

        Raises:
            OptionError: as `encode` does, and if labels are no indices.
        """
        raise NotImplementedError

    def explain(self, example: Example) -> Explanation:
        """Returns the tokens of an example, colored by their kind, with those that truncation deletes. `print` shows it.

        Raises:
            OptionError: as `encode` does.
        """
        raise NotImplementedError


class Encoded:
    """The ids of one example."""
