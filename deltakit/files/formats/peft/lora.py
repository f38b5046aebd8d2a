"""Reads PEFT's LoRA. The tensors' names have the paths of the modules, and the tensors the ranks."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
import torch
from torch import Tensor, nn

from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.patterns import Pattern
from deltakit.files.formats.peft.adapter import Adapter
from deltakit.files.formats.peft.dora import read_magnitudes
from deltakit.files.formats.peft.keys import LORA, LORA_BIAS, LORA_MAGNITUDES, LORA_OF_EMBEDDINGS, TOKENS_OF_LORA
from deltakit.files.formats.peft.layers import differs
from deltakit.files.formats.peft.parameters import parameter_at, stacked
from deltakit.files.formats.peft.tokens import read_tokens
from deltakit.files.schema import checked

_ABSENT = {
    # The reader of PEFT's own files has it.
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
"""Options of PEFT's LoRA that change its formula or its targets, and that deltakit does not have."""

_CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT changes the backbone's weights at the start."""


class _Config(TypedDict, total=False):
    """The fields that are read. PEFT gives those that are absent these defaults."""

    lora_alpha: float
    lora_dropout: float
    r: Annotated[int, msgspec.Meta(ge=1)]
    use_rslora: bool
    alpha_pattern: dict[str, float] | None
    target_parameters: list[str] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None


_DEFAULTS = _Config(
    lora_alpha=8,
    lora_dropout=0.0,
    r=8,
    use_rslora=False,
    alpha_pattern=None,
    target_parameters=None,
    trainable_token_indices=None,
)


class Scale(NamedTuple):
    """The options of one LoRA beside its rank, which the factors have."""

    alpha: float
    rslora: bool = False
    dropout: float = 0.0

    def factor(self, r: int) -> float:
        """Returns what the product of factors of a rank is multiplied by."""
        return self.alpha / (math.sqrt(r) if self.rslora else r)


def read_lora(adapter: Adapter, parts: Parts) -> None:
    """Adds the LoRAs of an adapter to the parts, and the rows of embeddings that it trains beside them.

    Raises:
        CheckpointError: if it has options that deltakit does not have, or a tensor does not fit.
    """
    dora = bool(adapter.config.get("use_dora"))
    scale_of = scales({**adapter.config, "use_dora": False}, adapter.folder, adapter.config_file)
    config = _config(adapter.config, adapter.config_file)
    found, targets = adapter.parts(LORA | LORA_OF_EMBEDDINGS), config["target_parameters"] or ()
    biases, magnitudes = adapter.parts(LORA_BIAS), adapter.parts(LORA_MAGNITUDES)
    _check_magnitudes(adapter, found if dora else (), magnitudes)
    if dora and (biases or targets):
        raise CheckpointError(
            f"{adapter.folder}: it has DoRA together with lora_bias or target_parameters, which PEFT does not have; save it "
            "again"
        )
    for path, pair in found.items():
        parameter = parameter_at(adapter, targets, path, found) if targets else ""
        name = parameter or path
        scale = scale_of(name)
        a, b = _factors(adapter, name, pair, "" if parameter else differs(adapter.module(path)))
        if parameter:
            a, b = stacked(adapter, parameter, pair, config["r"])
            options = {"r": a.shape[-2], **scale._asdict(), "untie": False}
            parts.add("lora", options, parameter, {"A": a, "B": b})
        else:
            m = read_magnitudes(adapter, path, magnitudes[path]["m"]) if dora else None
            add_lora(adapter, parts, path, a.flatten(1), b.flatten(1), scale, m)
        for bias in biases.get(path, {}).values():
            # It is behind B, so the scale is on it, too.
            parts.add("bitfit", {}, name, {"bias": bias * scale.factor(a.shape[-2] if parameter else len(a))})
    read_tokens(adapter, parts, TOKENS_OF_LORA, config["trainable_token_indices"])


def _check_magnitudes(adapter: Adapter, expected: Iterable[str], magnitudes: Mapping[str, Any]) -> None:
    differing = sorted(set(expected) ^ magnitudes.keys())
    if differing:
        raise CheckpointError(
            f"{adapter.folder}: use_dora={bool(adapter.config.get('use_dora'))} does not fit its tensors: {differing[0]} has "
            f"{'magnitudes' if differing[0] in magnitudes else 'none'}; save or download it again"
        )


def scales(config: Mapping[str, Any], place: Path, config_file: Path) -> Callable[[str], Scale]:
    """Returns what gives the options of the LoRA at a path, as the config of PEFT's LoRA says.

    Raises:
        CheckpointError: if the config is damaged, or has options that deltakit does not have.
    """
    _refuse_absent(config, place)
    found = _config(config, config_file)
    alphas = [
        (Pattern(rf"(.*\.)?({key})$", key, config_file / "alpha_pattern"), alpha)
        for key, alpha in (found["alpha_pattern"] or {}).items()
    ]

    def scale_of(path: str) -> Scale:
        alpha = next((alpha for pattern, alpha in alphas if pattern.matches(path)), found["lora_alpha"])
        return Scale(alpha, found["use_rslora"], found["lora_dropout"])

    return scale_of


def add_lora(
    adapter: Adapter, parts: Parts, path: str, a: Tensor, b: Tensor, scale: Scale, m: Tensor | None = None
) -> None:
    """Adds one LoRA with the factors A [r, d_in] and B [d_out, r] to the parts; with magnitudes [d_out], a DoRA."""
    if not a.numel() or not b.numel():
        raise CheckpointError(f"{adapter.folder}: the LoRA of {path} has no values; save or download it again")
    module = adapter.module(path)
    full = len(a)
    a, b = needed(a, b)
    share = len(a) / full
    options = {
        "r": len(a),
        "alpha": scale.alpha if share == 1 else scale.alpha * (math.sqrt(share) if scale.rslora else share),
        "rslora": scale.rslora,
        # PEFT drops no inputs of embeddings: they are ids.
        "dropout": 0.0 if isinstance(module, nn.Embedding) else scale.dropout,
        # PEFT adapts the module alone, also if its weight is tied.
        "untie": module is not None and adapter.is_tied(module._parameters.get("weight")),
    }
    if m is None:
        parts.add("lora", options, path, {"A": a, "B": b})
    else:
        parts.add("lora", {**options, "dora": True}, path, {"A": a, "B": b, "m": m})


def _config(config: Mapping[str, Any], where: Path) -> Any:
    return _DEFAULTS | checked(
        {key: value for key, value in config.items() if key in _Config.__annotations__}, _Config, where
    )


def _refuse_absent(config: Mapping[str, Any], place: Path) -> None:
    for option, what in _ABSENT.items():
        if config.get(option):
            raise CheckpointError(
                f"{place}: this LoRA of PEFT has {what} ({option}), which deltakit does not have; merge it into the "
                "backbone by PEFT's merge_and_unload()"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BACKBONE):
        raise CheckpointError(
            f"{place}: this LoRA of PEFT started by changing the backbone's weights (init_lora_weights={start!r}), "
            "so it does not fit the plain backbone; save it again by PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion="
        )


def _factors(adapter: Adapter, path: str, pair: dict[str, Tensor], why: str) -> tuple[Tensor, Tensor]:
    """Returns A and B of a target. Of convolutions, they are [r, in, *kernel] and [out, r, 1, ...]; ours are matrices."""
    if pair.keys() != {"A", "B"} or any(tensor.ndim < 2 for tensor in pair.values()):
        raise CheckpointError(f"{adapter.folder}: {path} has no two factors of LoRA; save or download it again")
    if why:
        raise CheckpointError(
            f"{adapter.folder}: {path} {why}, where PEFT's LoRA computes something else than deltakit's; merge it by PEFT's "
            "merge_and_unload()"
        )
    return pair["A"], pair["B"]


def needed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors with the same product, of a rank that is at most the smaller side of the weight.

    Rows of zeros that were padded are left out. PEFT also allows more rows than the product has.
    """
    if a.shape[0] != b.shape[1] or a.is_meta:
        return a, b
    used = a.any(1) | b.any(0)
    if not used.all():
        used[0] |= not used.any()
        a, b = a[used], b[:, used]
    if a.shape[0] <= min(a.shape[1], b.shape[0]):
        return a, b
    product = (b.double() @ a.double()).to(a.dtype)
    if a.shape[1] <= b.shape[0]:
        return torch.eye(a.shape[1], dtype=a.dtype), product
    return product, torch.eye(b.shape[0], dtype=b.dtype)
