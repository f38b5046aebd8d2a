"""OpenPrompt's templates and verbalizers."""

from typing import Any

from deltakit.openprompt.not_served import refuse
from deltakit.openprompt.prompts.knowledgeable_verbalizer import KnowledgeableVerbalizer
from deltakit.openprompt.prompts.manual_template import ManualTemplate
from deltakit.openprompt.prompts.manual_verbalizer import ManualVerbalizer
from deltakit.openprompt.prompts.mixed_template import MixedTemplate
from deltakit.openprompt.prompts.prototypical_verbalizer import ProtoVerbalizer
from deltakit.openprompt.prompts.soft_template import SoftTemplate
from deltakit.openprompt.prompts.soft_verbalizer import SoftVerbalizer

__all__ = [
    "KnowledgeableVerbalizer",
    "ManualTemplate",
    "ManualVerbalizer",
    "MixedTemplate",
    "ProtoVerbalizer",
    "SoftTemplate",
    "SoftVerbalizer",
]


def __getattr__(name: str) -> Any:
    refuse(__name__, name)
