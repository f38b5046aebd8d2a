"""Reads PEFT's AdaLoRA, B E A x with a diagonal E: with E in A it is LoRA. The ranks were chosen in training."""

from dataclasses import replace
from typing import TypedDict

from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.peft.keys import ADALORA, TOKENS_OF_LORA
from deltakit.files.formats.peft.lora import read_lora
from deltakit.files.formats.source import Source


class _Config(TypedDict):
    init_r: int


def read_adalora(source: Source, parts: Parts) -> None:
    """Adds the products of an adapter to the parts, as LoRAs.

    Raises:
        CheckpointError: if a tensor is missing or does not fit, or the config is damaged.
    """
    start = source.options(_Config, {"init_r": 12})["init_r"]
    tensors = {name: tensor for name, tensor in source.tensors.items() if name.endswith(tuple(TOKENS_OF_LORA))}
    for path, part in source.by_path(ADALORA).items():
        if part.keys() != {"A", "B", "E"} or part["A"].ndim != 2 or part["E"].shape != (len(part["A"]), 1):
            raise CheckpointError(
                f"{source.folder}: {path} has no three factors of AdaLoRA that fit; save or download it again"
            )
        rank = len(part["A"])
        if rank:
            # PEFT divides by the rank at the start and a little more, also where less is left. Without ranks it adds nothing.
            tensors[f"{path}.lora_A.weight"] = part["A"] * part["E"] * (rank / (start + 1e-5))
            tensors[f"{path}.lora_B.weight"] = part["B"]
    config = {key: value for key, value in source.config.items() if key not in _OF_RANKS}
    alpha = config.get("lora_alpha")
    if isinstance(alpha, int | float) and alpha <= 0:
        # PEFT takes the rank at the start then.
        config["lora_alpha"] = start
    read_lora(replace(source, config=config, tensors=tensors), parts)


_OF_RANKS = ("r", "rank_pattern", "use_rslora", "alpha_pattern")
"""What AdaLoRA inherits from LoRA and does not use."""
