"""Every argument of the room's classes and methods with values that do not belong there: our own error, or a meaning."""

import contextlib
import inspect
import warnings

import pytest
import torch

from deltakit import prompting
from deltakit.errors import DeltaError
from support.bad_arguments import BAD
from support.prompt_models import REVIEW, WORDS, model_of, tokenizer_of

TOKENIZER = tokenizer_of("wordpiece")
MODEL = model_of("bert")


def template(**options):
    return prompting.Template(**{"text": REVIEW, "tokenizer": TOKENIZER, "backbone": MODEL, **options})


def prompt_model(verbalizer=None):
    own = prompting.WordVerbalizer(TOKENIZER, WORDS) if verbalizer is None else verbalizer
    return prompting.PromptModel(MODEL, template(), own)


CLASSES = ["good", "bad"]
EXAMPLES = [{"text": "a film"}]
LABELLED = [{"text": "a film", "label": "good"}, {"text": "boring", "label": "bad"}]
SEARCHED = {"backbone": MODEL, "verbalizer": prompting.WordVerbalizer(TOKENIZER, WORDS), "examples": LABELLED}
UNIGRAM = tokenizer_of("unigram")
CALLS = {
    "Template": (prompting.Template, {"text": REVIEW, "tokenizer": TOKENIZER, "backbone": MODEL}),
    "WordVerbalizer": (prompting.WordVerbalizer, {"tokenizer": TOKENIZER, "words": WORDS}),
    "KnowledgeableVerbalizer": (prompting.KnowledgeableVerbalizer, {"tokenizer": TOKENIZER, "words": WORDS}),
    "SoftVerbalizer": (prompting.SoftVerbalizer, {"backbone": MODEL, "classes": CLASSES}),
    "PrototypicalVerbalizer": (prompting.PrototypicalVerbalizer, {"backbone": MODEL, "classes": CLASSES}),
    "MixedVerbalizer": (
        prompting.MixedVerbalizer,
        {"verbalizers": [prompting.WordVerbalizer(TOKENIZER, {**WORDS, "film": "film"})] * 2},
    ),
    "RuleVerbalizer": (prompting.RuleVerbalizer, {"tokenizer": TOKENIZER, "rules": {"a": ["good"], "b": ["bad"]}}),
    "PromptModel": (
        prompting.PromptModel,
        {"backbone": MODEL, "template": template(), "verbalizer": prompting.WordVerbalizer(TOKENIZER, WORDS)},
    ),
    "Ensemble": (prompting.Ensemble, {"models": [prompt_model()]}),
    "Template.render": (template().render, {"example": EXAMPLES[0]}),
    "Template.encode": (template().encode, {"example": EXAMPLES[0]}),
    "Template.explain": (template().explain, {"example": EXAMPLES[0]}),
    "Template.collate": (template().collate, {"examples": EXAMPLES}),
    "Template.soft_prompt": (template(text='{"soft"} {"mask"}').soft_prompt, {}),
    "PromptModel.collate": (prompt_model().collate, {"examples": EXAMPLES}),
    "PromptModel.predict": (prompt_model().predict, {"examples": EXAMPLES}),
    "PromptModel.calibrate": (prompt_model().calibrate, {"examples": EXAMPLES}),
    "PromptModel.refine": (
        prompt_model(prompting.KnowledgeableVerbalizer(TOKENIZER, WORDS)).refine,
        {"examples": EXAMPLES},
    ),
    "PromptModel.keep_with": (prompt_model().keep_with, {}),
    "PromptModel.from_delta": (prompting.PromptModel.from_delta, {"tokenizer": TOKENIZER}),
    "Ensemble.collate": (prompting.Ensemble([prompt_model()]).collate, {"examples": EXAMPLES}),
    "Ensemble.predict": (prompting.Ensemble([prompt_model()]).predict, {"examples": EXAMPLES}),
    "score_templates": (prompting.score_templates, {**SEARCHED, "templates": [template()]}),
    "search_triggers": (
        prompting.search_triggers,
        {**SEARCHED, "template": template(text='{"soft"} {"mask"}'), "forwards": 20, "candidates": 2},
    ),
    "search_label_words": (
        prompting.search_label_words,
        {"backbone": MODEL, "template": template(), "classes": CLASSES, "examples": LABELLED},
    ),
    "generate_templates": (
        prompting.generate_templates,
        {
            "filler": model_of("t5"),
            "tokenizer": UNIGRAM,
            "layout": '{"placeholder": "text"} {"soft"} {"mask"}',
            "words": {"good": "good", "bad": "bad"},
            "examples": LABELLED,
            "beams": 2,
            "forwards": 20,
        },
    ),
}
"""Each call with arguments that it takes."""

NONE = {"None"}
EMPTY = {"empty list", "empty tuple", "empty dict", "range"}
TEXTS = {"no", "false", "16", "own text", "long text", "empty text", "zero byte", "control"}
SWITCH = {"True", "False", "numpy bool"}
COUNT = {"1", "2**70", "numpy int"}
PREFIXES = {"KnowledgeableVerbalizer.prefix", "WordVerbalizer.prefix", "SoftVerbalizer.prefix", "RuleVerbalizer.prefix"}
ACCEPTED = {
    "Template.backbone": NONE,
    "Template.kind": NONE,
    "Template.max_length": NONE | COUNT,
    "Template.filters": NONE | {"empty dict"},
    "Template.collate.classes": NONE | {"empty list", "empty tuple"} | TEXTS,
    "KnowledgeableVerbalizer.learn_weights": SWITCH,
    # Only words need a tokenizer, and a prefix of theirs.
    "SoftVerbalizer.tokenizer": set(BAD),
    "PrototypicalVerbalizer.size": COUNT,
    "Ensemble.weights": NONE,
    "PromptModel.predict.examples": EMPTY,
    "Ensemble.predict.examples": EMPTY,
    "PromptModel.predict.top_k": {"0"} | COUNT,
    "Ensemble.predict.top_k": {"0"} | COUNT,
    "PromptModel.refine.drop": {"0"},
    "PromptModel.from_delta.filters": NONE,
    "Template.soft_prompt.method": set(),
    "score_templates.templates": EMPTY,
    **dict.fromkeys(("search_triggers.seed", "search_label_words.seed"), {"0", "-1"} | COUNT),
    **dict.fromkeys(
        (
            *("search_triggers.batch_size", "search_triggers.candidates", "score_templates.batch_size"),
            *("search_label_words.candidates", "search_label_words.assignments", "search_label_words.keep"),
            *("search_label_words.batch_size", "generate_templates.batch_size", "generate_templates.beams"),
            *("generate_templates.most_tokens", "generate_templates.forwards"),
        ),
        COUNT,
    ),
    **{
        f"{name}.batch_size": COUNT
        for name in ("PromptModel.predict", "PromptModel.calibrate", "PromptModel.refine", "Ensemble.predict")
    },
    **dict.fromkeys(PREFIXES, TEXTS),
}
"""Values that have a meaning, by the argument."""


def cases():
    for name, (function, _) in CALLS.items():
        for argument, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                yield name, argument


@pytest.mark.parametrize(("name", "argument"), [*cases()])
def test_bad_values(name, argument, unchecked):
    function, given = CALLS[name]
    allowed = ACCEPTED.get(f"{name}.{argument}", set())
    for label, make in BAD.items():
        if label in ("2**70",) and argument == "size":
            continue
        state = torch.get_rng_state()
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            try:
                function(**{**given, argument: make()})
            except DeltaError as error:
                assert str(error), label
            else:
                assert label in allowed, f"{name}({argument}={label}) was accepted"
        torch.set_rng_state(state)


def test_every_public_name_is_here():
    offered = {name: getattr(prompting, name) for name in prompting.__all__}
    classes = {
        name
        for name, kind in offered.items()
        if inspect.isfunction(kind) or (isinstance(kind, type) and "__init__" in vars(kind))
    }
    # What is returned to users, and made by none of them.
    made = {"Encoded", "Explanation", "Prediction", "SlotOutput", "TriggerSearch", "Verbalizer"}
    # What only `deltakit.openprompt` uses.
    inner = {
        "Field",
        "Soft",
        "Text",
        "call_at",
        "embedding_of",
        "parse_template",
        "soft_tokens",
        "standardized",
        "value_of",
        "word_ids",
    }
    assert classes - made - inner <= set(CALLS)
