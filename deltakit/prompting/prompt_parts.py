"""What a delta's files hold of a prompt model: its template and its verbalizer. Written, and read strictly."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, TypedDict

from torch import Tensor, nn

from deltakit.core import StoredExtra, gathered
from deltakit.errors import CheckpointError
from deltakit.files import check_tensors, checked_data, from_file
from deltakit.prompting.backbone_facts import Kind
from deltakit.prompting.template import Filters, Template
from deltakit.prompting.truncation import Truncate
from deltakit.prompting.verbalizers.knowledgeable import KnowledgeableVerbalizer
from deltakit.prompting.verbalizers.mixed import MixedVerbalizer
from deltakit.prompting.verbalizers.prototypical import PrototypicalVerbalizer
from deltakit.prompting.verbalizers.rules import RuleMulti, RuleVerbalizer
from deltakit.prompting.verbalizers.soft import SoftVerbalizer
from deltakit.prompting.verbalizers.verbalizer import Verbalizer
from deltakit.prompting.verbalizers.word_ids import Multi
from deltakit.prompting.verbalizers.words import WordVerbalizer, word_verbalizers

NAME = "prompting"
"""The name of the extra."""


class PromptParts:
    """The template and the verbalizer of a prompt model, as an extra of a delta.

    Args:
        fitted: whether the model was trained, calibrated, refined or loaded.
    """

    def __init__(self, template: Template, verbalizer: Verbalizer, *, fitted: bool = False) -> None:
        self.template, self.verbalizer, self.fitted = template, verbalizer, fitted

    def data(self) -> Mapping[str, Any]:
        """Returns the options of both, and the ids that the tokenizer gives them."""
        return {"template": self.template.to_dict(), "verbalizer": self.verbalizer.to_dict(), "ids": self.ids()}

    def ids(self) -> dict[str, Any]:
        """Returns the ids of the template without any field, and of the label words."""
        words = [list(word.ids) for own in word_verbalizers(self.verbalizer) for word in own.label_words]
        return {"template": list(self.template.fixed_ids), "words": words}

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the verbalizer's state dict."""
        return {name: gathered(tensor.detach()) for name, tensor in self.verbalizer.state_dict().items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptParts":
        # A copy of a layer copies the records of its deltas, and the tokenizer would be most of it.
        return PromptParts(self.template, deepcopy(self.verbalizer, memo), fitted=self.fitted)

    def __reduce__(self) -> tuple[Any, ...]:
        # Filters may be functions that no pickle holds.
        return StoredExtra, (self.data(), {name: tensor.clone() for name, tensor in self.tensors().items()})


class _Template(TypedDict):
    text: str
    kind: Kind
    max_length: int | None
    truncate: Truncate


class _Ids(TypedDict):
    template: list[int]
    words: list[list[int]]


class _PartsOfAll(TypedDict):
    template: _Template
    verbalizer: dict[str, Any]


class _Parts(_PartsOfAll, total=False):
    ids: _Ids


class _Words(TypedDict):
    words: dict[str, list[str]]
    prefix: str
    multi: Multi


class _Knowledgeable(_Words):
    learn_weights: bool


class _Soft(TypedDict):
    classes: list[str]


class _Prototypical(_Soft):
    size: int


class _Mixed(TypedDict):
    members: list[dict[str, Any]]


class _Rules(TypedDict):
    rules: dict[str, list[str]]
    prefix: str
    multi: RuleMulti


_Make = Callable[[nn.Module, Any, dict[str, Any]], Verbalizer]
_VERBALIZERS: dict[str, tuple[Any, _Make]] = {
    "words": (_Words, lambda _, tokenizer, own: WordVerbalizer(tokenizer, **own)),
    "knowledgeable": (_Knowledgeable, lambda _, tokenizer, own: KnowledgeableVerbalizer(tokenizer, **own)),
    "soft": (_Soft, lambda backbone, _, own: SoftVerbalizer(backbone, **own)),
    "prototypical": (_Prototypical, lambda backbone, _, own: PrototypicalVerbalizer(backbone, **own)),
    "rules": (_Rules, lambda _, tokenizer, own: RuleVerbalizer(tokenizer, **own)),
}


def read_parts(
    data: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    backbone: nn.Module,
    tokenizer: Any,
    filters: Filters | None,
    where: str,
) -> PromptParts:
    """Returns the template and the verbalizer that an extra describes.

    Raises:
        CheckpointError: if a field is missing or of a wrong type, tensors do not fit, or both do not fit the backbone and the
            tokenizer, which is another one if it gives other ids.
    """
    parts = checked_data(dict(data), _Parts, where, "extras.prompting")
    with from_file(where, "extras.prompting.template"):
        own = parts["template"]
        template = Template(own.pop("text"), tokenizer, backbone, filters=filters, **own)
    verbalizer = _verbalizer(parts["verbalizer"], tensors, backbone, tokenizer, where, "extras.prompting.verbalizer")
    check_tensors(tensors, verbalizer.state_dict(), own=(), where=where, advice="save or download it again")
    verbalizer.load_state_dict(dict(tensors))
    found = PromptParts(template, verbalizer)
    if parts.get("ids") not in (None, found.ids()):
        what = "the template" if parts["ids"]["template"] != found.ids()["template"] else "label words"
        raise CheckpointError(
            f"{where}: extras.prompting: this tokenizer gives {what} other ids than in training; pass the tokenizer "
            "of the training, or make the PromptModel of your own"
        )
    return found


def _verbalizer(
    data: dict[str, Any], tensors: Mapping[str, Tensor], backbone: nn.Module, tokenizer: Any, where: str, field: str
) -> Verbalizer:
    """Returns the verbalizer that a field describes, without its values.

    Raises:
        CheckpointError: as `read_parts` does.
    """
    if data.get("kind") == "mixed":
        mixed = checked_data({"members": data.get("members")}, _Mixed, where, field)
        members = [
            _plain(one, _below(tensors, f"members.{number}."), backbone, tokenizer, where, f"{field}.members[{number}]")
            for number, one in enumerate(mixed["members"])
        ]
        with from_file(where, field):
            return MixedVerbalizer(members)
    return _plain(data, tensors, backbone, tokenizer, where, field)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(
    data: dict[str, Any], tensors: Mapping[str, Tensor], backbone: nn.Module, tokenizer: Any, where: str, field: str
) -> Verbalizer:
    kind = data.pop("kind", None)
    if not isinstance(kind, str) or kind not in _VERBALIZERS:
        raise CheckpointError(
            f"{where}: {field}: found the kind {kind!r}, and deltakit has {', '.join(_VERBALIZERS)}; make the PromptModel of "
            "its own template and verbalizer"
        )
    form, make = _VERBALIZERS[kind]
    options = checked_data(data, form, where, field)
    rows = tensors["projection"].shape[:1] if "projection" in tensors else ()
    if options.get("size") not in (None, *rows):
        # Before memory is taken for so many.
        raise CheckpointError(
            f"{where}: {field}.size: it says {options['size']}, and its tensors have {rows}; save or download it again"
        )
    with from_file(where, field):
        return make(backbone, tokenizer, options)
