"""Searches for words: templates that a filler writes, triggers that gradients find, and label words."""

from deltakit.prompting.searching.filling import GeneratedTemplate, generate_templates
from deltakit.prompting.searching.scoring import ScoredTemplate, score_templates
from deltakit.prompting.searching.triggers import TriggerSearch, search_triggers
from deltakit.prompting.searching.word_choice import ScoredWords, search_label_words

__all__ = [
    "GeneratedTemplate",
    "ScoredTemplate",
    "ScoredWords",
    "TriggerSearch",
    "generate_templates",
    "score_templates",
    "search_label_words",
    "search_triggers",
]
