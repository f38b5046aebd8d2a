"""Which template and verbalizer a delta keeps for its files, where several prompt models share a backbone.

The ones of the model whose training began last, else of the one that was made last. So a model that is made to compare another
template, or as a member of an ensemble, does not take the place of the one that the delta was trained with.
"""

from torch import nn

from deltakit.core import attachments_of
from deltakit.prompting.prompt_parts import NAME, PromptParts


def keep_with_all(backbone: nn.Module, parts: PromptParts) -> bool:
    """Makes the active deltas of a backbone keep the parts of a model, and returns whether there are any.

    Parts that were only made do not replace those of a model that was trained, or those of a file.
    """
    found = [one.record for one in attachments_of(backbone) if one.record.live]
    for record in found:
        there = record.extras.get(NAME)
        # What was read from a file stays as it was read until a model is made of it.
        if there is None or parts.fitted or (isinstance(there, PromptParts) and not there.fitted):
            record.extras[NAME] = parts
    return bool(found)


def exchange(backbone: nn.Module, old: object, parts: PromptParts) -> None:
    """Makes the deltas that kept `old` keep these parts: a pickle holds the values that parts had, not the parts."""
    for record in (one.record for one in attachments_of(backbone)):
        if record.extras.get(NAME) is old:
            record.extras[NAME] = parts
