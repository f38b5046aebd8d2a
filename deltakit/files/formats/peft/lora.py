"""Reads PEFT's LoRA. The tensors' names have the paths of the modules, and the tensors the ranks."""

import math
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.peft.adapter import Adapter
from deltakit.files.formats.peft.keys import LORA, LORA_OF_EMBEDDINGS
from deltakit.files.formats.peft.layers import differs
from deltakit.files.formats.peft.patterns import Pattern
from deltakit.files.schema import checked

_ABSENT = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "biases of B",
    "target_parameters": "LoRA on parameters",
    "trainable_token_indices": "trained tokens of embeddings",
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
    use_rslora: bool
    alpha_pattern: dict[str, float] | None


_DEFAULTS = _Config(lora_alpha=8, lora_dropout=0.0, use_rslora=False, alpha_pattern=None)


def read_lora(adapter: Adapter, parts: Parts) -> None:
    """Adds the LoRAs of an adapter to the parts.

    Raises:
        CheckpointError: if it has options that deltakit does not have, or a tensor does not fit.
    """
    _refuse_absent(adapter)
    config: Any = _DEFAULTS | checked(
        {key: value for key, value in adapter.config.items() if key in _Config.__annotations__},
        _Config,
        adapter.config_file,
    )
    alphas = [
        (Pattern(rf"(.*\.)?({key})$", key, adapter.config_file / "alpha_pattern"), alpha)
        for key, alpha in (config["alpha_pattern"] or {}).items()
    ]
    for path, pair in adapter.parts(LORA | LORA_OF_EMBEDDINGS).items():
        alpha = next((alpha for pattern, alpha in alphas if pattern.matches(path)), config["lora_alpha"])
        a, b = _factors(adapter, path, pair)
        full = a.shape[0]
        a, b = _needed(a, b)
        share = a.shape[0] / full
        module = adapter.module(path)
        options = {
            "r": a.shape[0],
            "alpha": alpha if share == 1 else alpha * (math.sqrt(share) if config["use_rslora"] else share),
            "rslora": config["use_rslora"],
            # PEFT drops no inputs of embeddings: they are ids.
            "dropout": 0.0 if isinstance(module, nn.Embedding) else config["lora_dropout"],
            # PEFT adapts the module alone, also if its weight is tied.
            "untie": module is not None and adapter.is_tied(module._parameters.get("weight")),
        }
        parts.add("lora", options, path, {"A": a, "B": b})


def _refuse_absent(adapter: Adapter) -> None:
    for option, what in _ABSENT.items():
        if adapter.config.get(option):
            raise CheckpointError(
                f"{adapter.folder}: this LoRA of PEFT has {what} ({option}), which deltakit does not have; merge it into the "
                "backbone by PEFT's merge_and_unload()"
            )
    start = adapter.config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BACKBONE):
        raise CheckpointError(
            f"{adapter.folder}: this LoRA of PEFT started by changing the backbone's weights (init_lora_weights={start!r}), "
            "so it does not fit the plain backbone; save it again by PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion="
        )


def _factors(adapter: Adapter, path: str, pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns A [r, d_in] and B [d_out, r] of a target."""
    if pair.keys() != {"A", "B"} or any(tensor.ndim < 2 for tensor in pair.values()):
        raise CheckpointError(f"{adapter.folder}: {path} has no two factors of LoRA; save or download it again")
    why = differs(adapter.module(path))
    if why:
        raise CheckpointError(
            f"{adapter.folder}: {path} {why}, where PEFT's LoRA computes something else than deltakit's; merge it by PEFT's "
            "merge_and_unload()"
        )
    # Of convolutions, A [r, in, *kernel] and B [out, r, 1, ...]; ours are matrices.
    return pair["A"].flatten(1), pair["B"].flatten(1)


def _needed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
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
