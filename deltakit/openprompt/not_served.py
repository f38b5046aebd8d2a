"""Names of OpenPrompt that are not served, and what to use instead."""

from typing import NoReturn

from deltakit.errors import OptionError

_TRAINER = "use a loop, or transformers' Trainer with deltakit.prompting.PromptModel"
_SEARCH = "write the template and the words, or look for them with deltakit's search for prompts"
INSTEAD = {
    "PromptForGeneration": "call generate on the backbone; dk.SoftPrompt and dk.Prefix train it",
    "ClassificationRunner": _TRAINER,
    "GenerationRunner": _TRAINER,
    "LMBFFClassificationRunner": _TRAINER,
    "ProtoVerbClassificationRunner": "train as usual, then call ProtoVerbalizer.train_proto",
    "PrefixTuningTemplate": "attach dk.Prefix to the backbone",
    "PtuningTemplate": "write {'soft'} in a MixedTemplate, or use deltakit.prompting.Template with dk.PTuning",
    "PTRTemplate": "write one {'mask'} for each slot in deltakit.prompting.Template",
    "PTRVerbalizer": "use deltakit.prompting.RuleVerbalizer",
    "AutomaticVerbalizer": _SEARCH,
    "One2oneVerbalizer": "use a ManualVerbalizer with one word for each class",
    "GenerationVerbalizer": "call generate on the backbone",
    "T5TemplateGenerator": _SEARCH,
    "RobertaVerbalizerGenerator": _SEARCH,
}


def refuse(module: str, name: str) -> NoReturn:
    """Raises the error for a name that a module does not have.

    Raises:
        OptionError: if OpenPrompt has it.
        AttributeError: otherwise.
    """
    if name in INSTEAD:
        raise OptionError(f"{module}.{name} is not served; {INSTEAD[name]}")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
