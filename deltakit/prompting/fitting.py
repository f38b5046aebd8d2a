"""Checks that a backbone, a template and a verbalizer fit, before any training starts."""

from typing import Any

from torch import nn

from deltakit.core import delta_children
from deltakit.errors import OptionError, StateError
from deltakit.ops import PromptVectorsDelta
from deltakit.prompting.backbone_facts import embedding_of, head_of, longest_input, vocabulary_of
from deltakit.prompting.template import Template
from deltakit.prompting.verbalizers.verbalizer import Verbalizer


def check_fit(backbone: nn.Module, template: Template, verbalizer: Verbalizer) -> None:
    """Refuses what cannot work together.

    Raises:
        OptionError: if the slots differ in number, a token is beyond the backbone's vocabulary, or words do not fit its
        length. TargetError: if the backbone has no language-model head.
    """
    head: Any = head_of(backbone)
    if template.num_slots != verbalizer.num_slots:
        raise OptionError(
            f"PromptModel: the template has {template.num_slots} slots, and the {type(verbalizer).__name__} reads "
            f"{verbalizer.num_slots}; write as many, or use a RuleVerbalizer for several"
        )
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
    scored = verbalizer.scored_words
    if scored and not template.in_decoder:
        _check_room(backbone, template, max(map(len, scored)) - 1)


def _check_room(backbone: nn.Module, template: Template, more: int) -> None:
    limit = longest_input(backbone, template.tokenizer)
    if limit is not None and template.max_length is not None and template.max_length + more > limit:
        raise OptionError(
            f"PromptModel: with multi='score' a word takes up to {more} tokens beyond max_length {template.max_length}, and "
            f"the backbone takes {limit}; pass Template(max_length={limit - more})"
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
