"""The config of a LoRA of PEFT, which diffusers writes into the metadata of its files, too."""

from collections.abc import Collection
from typing import Annotated, Any, TypedDict

import msgspec

from deltakit.errors import CheckpointError
from deltakit.files.formats.lora import Scale
from deltakit.files.formats.patterns import Patterns
from deltakit.files.formats.source import Source

_ABSENT = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
"""Options of PEFT's LoRA that change its formula or its targets, and that not all readers have."""

_CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT changes the backbone's weights at the start."""

_MERGE = {
    "PEFT": "merge it into the backbone by PEFT's merge_and_unload()",
    "diffusers": "merge it into the model by diffusers' fuse_lora()",
}
_CONVERT = "save it again by PEFT's save_pretrained with path_initial_model_for_weight_conversion="
"""What to do, by the library of the file."""


class _Config(TypedDict, total=False):
    """The fields that are read. PEFT gives those that are absent these defaults."""

    lora_alpha: float
    lora_dropout: float
    r: Annotated[int, msgspec.Meta(ge=1)]
    use_rslora: bool
    alpha_pattern: dict[str, float] | None
    rank_pattern: dict[str, Annotated[int, msgspec.Meta(ge=1)]] | None
    target_parameters: list[str] | None
    alora_invocation_tokens: list[int] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None


_DEFAULTS = _Config(
    lora_alpha=8,
    lora_dropout=0.0,
    r=8,
    use_rslora=False,
    alpha_pattern=None,
    rank_pattern=None,
    target_parameters=None,
    alora_invocation_tokens=None,
    trainable_token_indices=None,
)


class LoRAOptions:
    """The options of the LoRAs in a file, as its config says.

    Raises:
        CheckpointError: if the config is damaged, or has options that deltakit does not have.
    """

    def __init__(self, source: Source, *, has: Collection[str] = ()) -> None:
        """
        Args:
            has: those options of PEFT's LoRA beyond its formula that the reader has.
        """
        _refuse_absent(source, has)
        self.config: Any = source.options(_Config, _DEFAULTS)
        self._alphas, self._ranks = (
            Patterns(self.config[field] or {}, source.config_file / field)
            for field in ("alpha_pattern", "rank_pattern")
        )

    def scale(self, path: str) -> Scale:
        """Returns what the LoRA at a path has beside its rank."""
        alpha = self._alphas.value_at(path, self.config["lora_alpha"])
        return Scale(alpha, self.config["use_rslora"], self.config["lora_dropout"])

    @property
    def invocation(self) -> tuple[int, ...]:
        """The ids from which on the LoRAs act on a text; none if they act on all of it."""
        return tuple(self.config["alora_invocation_tokens"] or ())

    def rank(self, path: str) -> int:
        """Returns the rank of the LoRA at a path, which its factors show, too, unless they are those of a stack."""
        return self._ranks.value_at(path, self.config["r"])


def _refuse_absent(source: Source, has: Collection[str]) -> None:
    for option, what in _ABSENT.items():
        if source.config.get(option) and option not in has:
            raise CheckpointError(
                f"{source.folder}: this LoRA of {source.library} has {what} ({option}), which deltakit does not have; "
                f"{_MERGE[source.library]}"
            )
    start = source.config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BACKBONE):
        raise CheckpointError(
            f"{source.folder}: this LoRA of {source.library} started by changing the backbone's weights "
            f"(init_lora_weights={start!r}), so it does not fit the plain backbone; "
            + (_CONVERT if source.library == "PEFT" else _MERGE[source.library])
        )
