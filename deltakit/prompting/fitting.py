"""Checks that a backbone, a template and a verbalizer fit, before any training starts."""

from typing import Any

from torch import nn

from deltakit.core import delta_children
from deltakit.errors import OptionError, StateError
from deltakit.ops import PromptVectorsDelta
from deltakit.prompting.backbone_facts import embedding_of, head_of, positions_of, vocabulary_of
from deltakit.prompting.template import Template
from deltakit.prompting.verbalizers.verbalizer import Verbalizer
from deltakit.prompting.verbalizers.word_ids import word_ids
from deltakit.prompting.verbalizers.words import word_verbalizers


def check_fit(backbone: nn.Module, template: Template, verbalizer: Verbalizer) -> None:
    """Refuses what cannot work together.

    Raises:
        OptionError: if the slots differ in number, the tokenizers differ, a token is beyond the backbone's vocabulary, or
        texts do not fit its length. TargetError: if the backbone has no language-model head.
    """
    head: Any = head_of(backbone)
    if template.num_slots != verbalizer.num_slots:
        raise OptionError(
            f"PromptModel: the template has {template.num_slots} slots, and the {type(verbalizer).__name__} reads "
            f"{verbalizer.num_slots}; write as many, or use a RuleVerbalizer for several"
        )
    _check_tokenizers(template, verbalizer)
    words = getattr(head, "out_features", None) or vocabulary_of(backbone)
    beyond = [one for one in [*verbalizer.token_ids, *template.marker_ids] if one >= words]
    if beyond:
        token = template.tokenizer.convert_ids_to_tokens(beyond[0])
        raise OptionError(
            f"PromptModel: the token {token!r} has the id {beyond[0]}, and the backbone knows {words}; use its own tokenizer, "
            "or resize it first (backbone.resize_token_embeddings)"
        )
    if template.num_soft and template.first_soft != vocabulary_of(backbone):
        raise OptionError(
            f"PromptModel: the template's soft tokens have the ids from {template.first_soft} on, and the backbone has "
            f"{vocabulary_of(backbone)} words; make the template with this backbone"
        )
    _check_room(backbone, template, verbalizer)


def _check_tokenizers(template: Template, verbalizer: Verbalizer) -> None:
    for own in word_verbalizers(verbalizer):
        for one in own.label_words:
            try:
                ids = word_ids(template.tokenizer, one.word, own.prefix, "PromptModel")
            except OptionError:
                ids = ()
            if ids != one.ids:
                raise OptionError(
                    f"PromptModel: the word {one.word!r} has the ids {list(one.ids)} by the verbalizer's tokenizer, and "
                    f"{list(ids)} by the template's; pass the backbone's tokenizer to both"
                )


def _check_room(backbone: nn.Module, template: Template, verbalizer: Verbalizer) -> None:
    limit, ahead, longer = positions_of(backbone), *_taken(backbone, template, verbalizer)
    if limit is None:
        return
    reasons = [f"an attached prompt takes {ahead} tokens"] if ahead else []
    reasons += [f"with multi='score' a word takes up to {longer} tokens"] if longer else []
    if template.max_length is None:
        raise OptionError(
            f"PromptModel: {type(backbone).__name__} takes {limit} tokens, and the template was made without it and has no "
            f"limit; pass Template(max_length={limit - ahead - longer})"
        )
    if template.max_length + ahead + longer > limit:
        what = f"{' and '.join(reasons)} beyond max_length" if reasons else "max_length is"
        raise OptionError(
            f"PromptModel: {what} {template.max_length}, and the backbone takes {limit}; pass "
            f"Template(max_length={limit - ahead - longer})"
        )


def shorten_to_fit(backbone: nn.Module, template: Template, verbalizer: Verbalizer) -> None:
    """Lowers a template's limit to what the backbone takes.

    A prompt that was attached after the template was made takes a part of it, and files have the template as it was made.
    """
    limit = positions_of(backbone)
    room = None if limit is None else limit - sum(_taken(backbone, template, verbalizer))
    if room is not None and 0 < room < (template.max_length or limit or 0):
        template.max_length = room


def _taken(backbone: nn.Module, template: Template, verbalizer: Verbalizer) -> tuple[int, int]:
    """Returns how many of the backbone's positions are not for the text: of attached prompts, and of long words."""
    scored = verbalizer.scored_words
    longer = max(map(len, scored)) - 1 if scored and not template.in_decoder else 0
    return _prompts_ahead(backbone), longer


def _prompts_ahead(backbone: nn.Module) -> int:
    """Returns how many tokens attached prompts insert into a text."""
    found = delta_children(embedding_of(backbone)).values()
    return sum(
        child.tokens for child in found if isinstance(child, PromptVectorsDelta) and child.live and child.inserted
    )


def check_soft(backbone: nn.Module, template: Template) -> None:
    """Refuses to call a backbone with soft tokens that nobody has vectors for.

    Raises:
        StateError: if no active delta has as many as the template.
    """
    if not template.num_soft:
        return
    found = [
        child.tokens
        for child in delta_children(embedding_of(backbone)).values()
        if isinstance(child, PromptVectorsDelta) and child.live and not child.inserted
    ]
    if template.num_soft not in found:
        there = f"; an attached one has {found[0]}" if found else ""
        raise StateError(
            f"the template has {template.num_soft} soft tokens, and no attached and active delta has their vectors{there}; "
            "attach them first: dk.attach(backbone, template.soft_prompt())"
        )
