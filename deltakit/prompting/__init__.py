"""Prompt learning: templates turn a task into words that a language model predicts, verbalizers turn these words into classes.

template = Template('{"placeholder": "text"} It was {"mask"}.', tokenizer, model)
verbalizer = WordVerbalizer(tokenizer, {"good": ["great", "good"], "bad": ["bad", "awful"]})
prompt_model = PromptModel(model, template, verbalizer)
prompt_model.predict({"text": "A film to remember."})
"""

from deltakit.prompting.backbone_facts import Kind, embedding_of
from deltakit.prompting.collating import Encoded
from deltakit.prompting.ensemble import Ensemble
from deltakit.prompting.explanation import Explanation
from deltakit.prompting.pieces import Field, Piece, Soft, Text
from deltakit.prompting.prediction import Prediction
from deltakit.prompting.prompt_model import PromptModel
from deltakit.prompting.rendering import value_of
from deltakit.prompting.searching import (
    GeneratedTemplate,
    ScoredTemplate,
    ScoredWords,
    TriggerSearch,
    generate_templates,
    score_templates,
    search_label_words,
    search_triggers,
)
from deltakit.prompting.slot_calls import call_at
from deltakit.prompting.soft_tokens import numbered as soft_tokens
from deltakit.prompting.syntax import parse as parse_template
from deltakit.prompting.template import Template
from deltakit.prompting.verbalizers.knowledgeable import KnowledgeableVerbalizer
from deltakit.prompting.verbalizers.mixed import MixedVerbalizer, standardized
from deltakit.prompting.verbalizers.prototypical import PrototypicalVerbalizer
from deltakit.prompting.verbalizers.rules import RuleVerbalizer
from deltakit.prompting.verbalizers.soft import SoftVerbalizer
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer
from deltakit.prompting.verbalizers.word_ids import word_ids
from deltakit.prompting.verbalizers.words import WordVerbalizer

__all__ = [
    "Encoded",
    "Ensemble",
    "Explanation",
    "Field",
    "GeneratedTemplate",
    "Kind",
    "KnowledgeableVerbalizer",
    "MixedVerbalizer",
    "Piece",
    "Prediction",
    "PromptModel",
    "PrototypicalVerbalizer",
    "RuleVerbalizer",
    "ScoredTemplate",
    "ScoredWords",
    "SlotOutput",
    "Soft",
    "SoftVerbalizer",
    "Template",
    "Text",
    "TriggerSearch",
    "Verbalizer",
    "WordVerbalizer",
    "call_at",
    "embedding_of",
    "generate_templates",
    "parse_template",
    "score_templates",
    "search_label_words",
    "search_triggers",
    "soft_tokens",
    "standardized",
    "value_of",
    "word_ids",
]
