"""OpenPrompt's API: code written for OpenPrompt runs after importing from `deltakit.openprompt` instead of `openprompt`.

It has OpenPrompt's module names, arguments and defaults, on the templates and the slots' logits of `deltakit.prompting`. Where
OpenPrompt says nothing of words that are split or the same, a warning does. `install()` serves `import openprompt` itself.
"""

from typing import Any

from deltakit.core import alias_package
from deltakit.openprompt.data_loader import PromptDataLoader
from deltakit.openprompt.not_served import refuse
from deltakit.openprompt.pipeline_base import PromptForClassification, PromptModel
from deltakit.openprompt.prompt_base import Template, Verbalizer

__all__ = ["PromptDataLoader", "PromptForClassification", "PromptModel", "Template", "Verbalizer", "install"]

__version__ = "1.0.1"
"""The version of OpenPrompt whose API this is."""


def install() -> None:
    """Makes `import openprompt` and `from openprompt.plms import ...` import this package. Call it before such imports.

    Raises:
        StateError: if OpenPrompt itself is imported already.
    """
    alias_package(__name__, "openprompt")


def __getattr__(name: str) -> Any:
    refuse(__name__, name)
