"""RuleVerbalizer (PTR): a class is a conjunction of words in several slots.

Han et al. 2021, https://arxiv.org/abs/2105.11259, section 3.3.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer
from deltakit.prompting.verbalizers.words import WordVerbalizer

RuleMulti = Literal["refuse", "mean", "first"]


class RuleVerbalizer(Verbalizer):
    """log p(class) = sum_j log p_j(word of the class in slot j), normalized.

    In each slot compete the words that rules have there. So "person was born in city" shares what it learns about "person"
    with all rules that have it.

    Args:
        tokenizer: the backbone's tokenizer.
        rules: for each class its word in each slot, such as `{"parent": ("person", "parent", "person")}`.
        prefix, multi: as of `WordVerbalizer`.

    Raises:
        OptionError: if rules have different numbers of words, two classes have the same words, or a word does not fit.
    """

    @checked
    def __init__(
        self, tokenizer: Any, rules: Mapping[str, Sequence[str]], *, prefix: str = " ", multi: RuleMulti = "refuse"
    ) -> None:
        counts = sorted({len(rule) for rule in rules.values()})
        super().__init__(list(rules), num_slots=counts[0] if counts else 1)
        self.rules = {name: tuple(rule) for name, rule in rules.items()}
        if len(counts) > 1 or not counts[0]:
            raise OptionError(
                f"RuleVerbalizer: the rules have {' and '.join(map(str, counts))} words; write one word for each slot in all "
                "of them"
            )
        seen: dict[tuple[str, ...], str] = {}
        for name, rule in self.rules.items():
            other = seen.setdefault(rule, name)
            if other != name:
                raise OptionError(
                    f"RuleVerbalizer: the classes {other!r} and {name!r} have the same words {rule}; change one"
                )
        self.prefix, self.multi = prefix, multi
        # In a slot each word is a class of its own.
        self.slots = torch.nn.ModuleList(
            WordVerbalizer(tokenizer, {word: word for word in words}, prefix=prefix, multi=multi)
            for words in (dict.fromkeys(rule[slot] for rule in self.rules.values()) for slot in range(counts[0]))
        )

    @property
    def token_ids(self) -> list[int]:
        return sorted({one for slot in self._verbalizers() for one in slot.token_ids})

    def _verbalizers(self) -> list[WordVerbalizer]:
        return [slot for slot in self.slots if isinstance(slot, WordVerbalizer)]

    def forward(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        return self.conjunctions(output).log_softmax(-1)

    def conjunctions(self, output: SlotOutput) -> Float[Tensor, "batch classes"]:
        """Returns sum_j log p_j(word of the class in slot j), which is not normalized over the classes."""
        found = []
        for number, (slot, own) in enumerate(self._by_slot(output)):
            log_probs = slot(own)
            # The classes of the slot are its words.
            words = [slot.classes.index(rule[number]) for rule in self.rules.values()]
            found.append(log_probs[:, torch.tensor(words, device=log_probs.device)])
        return torch.stack(found).sum(0)

    def _by_slot(self, output: SlotOutput) -> list[tuple[WordVerbalizer, SlotOutput]]:
        parts = zip(output.logits.split(1, 1), output.hidden.split(1, 1), strict=True)
        return [(slot, SlotOutput(*own)) for slot, own in zip(self._verbalizers(), parts, strict=True)]

    def observed(self, output: SlotOutput) -> tuple[Tensor, ...]:
        return tuple(slot.word_log_probs(own) for slot, own in self._by_slot(output))

    def calibrate(self, *observed: Float[Tensor, "examples _"]) -> None:
        for slot, found in zip(self._verbalizers(), observed, strict=True):
            slot.calibrate(found)

    def to_dict(self) -> dict[str, Any]:
        rules = {name: list(rule) for name, rule in self.rules.items()}
        return {"kind": "rules", "rules": rules, "prefix": self.prefix, "multi": self.multi}
