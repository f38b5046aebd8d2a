"""Soft prompts with OpenDelta's names."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from deltakit.core import Method, checked
from deltakit.errors import OptionError
from deltakit.methods.soft_prompt import SoftPrompt
from deltakit.opendelta.basemodel import DeltaBase
from deltakit.opendelta.delta_configs import BaseDeltaConfig
from deltakit.opendelta.matching import Selectors
from deltakit.ops import PromptVectorsDelta as SoftPromptLayer

__all__ = ["SoftPromptConfig", "SoftPromptLayer", "SoftPromptModel"]

_EXPANDED: Mapping[str, int] = {"attention_mask": 1, "token_type_ids": 0}


class SoftPromptConfig(BaseDeltaConfig):
    """The options of `SoftPromptModel`."""

    delta_type = "soft_prompt"
    method = SoftPrompt
    renamed = {"soft_token_num": "tokens", "init_range": "init_range"}  # noqa: RUF012  # as declared

    def __init__(
        self,
        soft_token_num: int = 100,
        init_range: float = 0.5,
        token_init: bool = True,
        other_expand_ids: Mapping[str, int] = _EXPANDED,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.soft_token_num, self.init_range, self.token_init = soft_token_num, init_range, token_init
        self.other_expand_ids = dict(other_expand_ids)

    def method_at(self, at: Any, **options: Any) -> Method:
        """Returns deltakit's method with these options. The prompt stands in front of all tokens, and stays in the result."""
        first = range(self.soft_token_num) if self.token_init else None
        init = "vocab" if self.token_init else "random"
        own: dict[str, Any] = {
            "tokens": self.soft_token_num,
            "init": init,
            "init_ids": first,
            "init_range": self.init_range,
        }
        return SoftPrompt(**own, where="start", trim=False, **options)

    @classmethod
    def options_of(cls, method: Mapping[str, Any]) -> dict[str, Any]:
        """Returns OpenDelta's options for a method as deltakit's files have it."""
        return {**super().options_of(method), "token_init": method.get("init") != "random"}


def _check_vocabulary(backbone: nn.Module, tokens: int) -> None:
    """Refuses a prompt that starts from the first tokens of a vocabulary with fewer tokens.

    Raises:
        OptionError: if the vocabulary is smaller.
    """
    ask = getattr(backbone, "get_input_embeddings", None)
    embedding = ask() if ask is not None else None
    if isinstance(embedding, nn.Embedding) and embedding.num_embeddings < tokens:
        raise OptionError(
            f"SoftPromptModel(soft_token_num={tokens}): it starts from the first {tokens} tokens of the vocabulary, and this "
            f"backbone has {embedding.num_embeddings}; pass soft_token_num={embedding.num_embeddings} or less, or "
            "token_init=False"
        )


@checked
class SoftPromptModel(DeltaBase):
    """A soft prompt with OpenDelta's options, attached at once. Raises what `attach` raises.

    As in OpenDelta, it stands in front of all tokens, [CLS] included, and the result is longer by the prompt.
    `modified_modules` has no effect.
    """

    delta_type = "soft_prompt"
    config_class = SoftPromptConfig
    default_modified_modules = ("root",)

    def __init__(
        self,
        backbone_model: nn.Module,
        soft_token_num: int = 100,
        init_range: float = 0.5,
        token_init: bool = True,
        other_expand_ids: Mapping[str, int] = _EXPANDED,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
    ) -> None:
        given = locals() | {"modified_modules": None, "common_structure": False, "other_expand_ids": _EXPANDED}
        if interactive_modify:
            raise OptionError(
                f"SoftPromptModel(interactive_modify={interactive_modify}): a soft prompt stands in front of the tokens, so "
                "there are no modules to pick; omit interactive_modify="
            )
        if dict(other_expand_ids) != _EXPANDED:
            raise OptionError(
                f"SoftPromptModel(other_expand_ids={dict(other_expand_ids)}): only {dict(_EXPANDED)} is served: the mask and "
                "the token types grow with the prompt, and nothing else does"
            )
        if token_init:
            _check_vocabulary(backbone_model, soft_token_num)
        self._attach_with(given)

    def _targets(self) -> None:
        return None
