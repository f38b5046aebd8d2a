"""Reads PEFT's LoRA. The tensors' names have the paths of the modules, and the tensors the ranks."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from deltakit.errors import CheckpointError
from deltakit.files.formats.dora import read_magnitudes
from deltakit.files.formats.format import Parts
from deltakit.files.formats.layers import differs
from deltakit.files.formats.lora import LORA, LORA_MAGNITUDES, LORA_OF_EMBEDDINGS, add_lora
from deltakit.files.formats.lora_config import LoRAOptions
from deltakit.files.formats.peft.keys import LORA_BIAS, TOKENS_OF_LORA
from deltakit.files.formats.peft.parameters import parameter_at, stacked
from deltakit.files.formats.peft.tokens import read_tokens
from deltakit.files.formats.source import Source


def read_lora(source: Source, parts: Parts) -> None:
    """Adds the LoRAs of an adapter to the parts, and the rows of embeddings that it trains beside them.

    Raises:
        CheckpointError: if it has options that deltakit does not have, or a tensor does not fit.
    """
    dora = bool(source.config.get("use_dora"))
    options = LoRAOptions(source, has=("use_dora", "alora_invocation_tokens"))
    found, targets = source.by_path(LORA | LORA_OF_EMBEDDINGS), options.config["target_parameters"] or ()
    biases, magnitudes = source.by_path(LORA_BIAS), source.by_path(LORA_MAGNITUDES)
    _check_magnitudes(source, found if dora else (), magnitudes)
    kind = "DoRA" if dora else "activated LoRA" if options.invocation else ""
    if kind and (biases or targets or (dora and options.invocation)):
        raise CheckpointError(
            f"{source.folder}: it has {kind} together with lora_bias, target_parameters or alora_invocation_tokens, which "
            "deltakit does not have; use it in PEFT"
        )
    for path, pair in found.items():
        parameter = parameter_at(source, targets, path, found, options.rank) if targets else ""
        name = parameter or path
        scale = options.scale(name)
        a, b = _factors(source, name, pair, "" if parameter else differs(source.module(path)))
        if parameter:
            a, b = stacked(source, parameter, pair, options.rank(parameter))
            own = {"r": a.shape[-2], **scale._asdict(), "untie": False}
            parts.add("lora", own, parameter, {"A": a, "B": b})
        else:
            m = read_magnitudes(source, path, magnitudes[path]["m"]) if dora else None
            add_lora(source, parts, path, a.flatten(1), b.flatten(1), scale, m, options.invocation)
        for bias in biases.get(path, {}).values():
            # It is behind B, so the scale is on it, too.
            parts.add("bitfit", {}, name, {"bias": bias * scale.factor(a.shape[-2] if parameter else len(a))})
    read_tokens(source, parts, TOKENS_OF_LORA, options.config["trainable_token_indices"])


def _check_magnitudes(source: Source, expected: Iterable[str], magnitudes: Mapping[str, Any]) -> None:
    differing = sorted(set(expected) ^ magnitudes.keys())
    if differing:
        raise CheckpointError(
            f"{source.folder}: use_dora={bool(source.config.get('use_dora'))} does not fit its tensors: {differing[0]} has "
            f"{'magnitudes' if differing[0] in magnitudes else 'none'}; save or download it again"
        )


def _factors(source: Source, path: str, pair: dict[str, Tensor], why: str) -> tuple[Tensor, Tensor]:
    """Returns A and B of a target. Of convolutions, they are [r, in, *kernel] and [out, r, 1, ...]; ours are matrices."""
    if pair.keys() != {"A", "B"} or any(tensor.ndim < 2 for tensor in pair.values()):
        raise CheckpointError(f"{source.folder}: {path} has no two factors of LoRA; save or download it again")
    if why:
        raise CheckpointError(
            f"{source.folder}: {path} {why}, where PEFT's LoRA computes something else than deltakit's; merge it by PEFT's "
            "merge_and_unload()"
        )
    return pair["A"], pair["B"]
