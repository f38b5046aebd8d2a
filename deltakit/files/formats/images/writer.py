"""Writes a delta as a LoRA of diffusers, which `pipe.load_lora_weights` and `unet.load_lora_adapter` open.

diffusers attaches LoRAs by PEFT, so the factors and the config are those of PEFT's writer; the config stands in the metadata
of the file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltakit.core import Attachment
from deltakit.files.checkpoint import plain_tensors, write_files, write_tensors
from deltakit.files.formats.images.keys import METADATA, TENSORS
from deltakit.files.formats.lora_writer import lora_of
from deltakit.files.formats.writing import Writing

_COMPONENTS = {"UNet": "unet", "Transformer": "transformer", "CLIPTextModelWithProjection": "text_encoder_2"}
_TEXT = "CLIPTextModel"


def write(
    folder: Path, attachment: Attachment, tensors: Mapping[str, Tensor], _config: Mapping[str, Any], card: str
) -> None:
    """Writes a delta into a folder as a LoRA of diffusers; see `Writer`.

    Raises:
        CheckpointError: if diffusers has no such LoRA, or the files cannot be written.
    """
    writing = Writing(attachment, tensors, "diffusers", "a LoRA of diffusers")
    _refuse(writing)
    options, named = lora_of(writing)
    component = component_of(attachment.backbone)
    prefix = f"{component}." if component else ""
    metadata = {
        "format": "pt",
        METADATA: json.dumps({f"{prefix}{key}": value for key, value in options.items()}, sort_keys=True),
    }

    def fill(own: Path) -> list[str]:
        write_tensors(
            own / TENSORS, plain_tensors({f"{prefix}{name}": value for name, value in named.items()}), metadata
        )
        return [TENSORS]

    write_files(folder, fill, card)


def component_of(backbone: nn.Module) -> str:
    """Returns what the pipelines of diffusers call a model of this class; "" for a model that is in none."""
    name = type(backbone).__name__
    if name == _TEXT:
        return "text_encoder"
    known = type(backbone).__module__.startswith("diffusers.") or name.startswith(_TEXT)
    return next((component for part, component in _COMPONENTS.items() if known and part in name), "")


def _refuse(writing: Writing) -> None:
    attachment = writing.attachment
    kinds = sorted({method.name for method in attachment.record.methods})
    full = [name for name in attachment.record.fully_trained if name in writing.tensors]
    embedding = next((site for site in attachment.sites if isinstance(site.target, nn.Embedding)), None)
    why = ""
    methods: Sequence[Any] = attachment.record.methods
    others = {"DoRA": "dora", "activated LoRA": "invocation"} if kinds == ["lora"] else {}
    other = next((what for what, option in others.items() if any(getattr(one, option) for one in methods)), "")
    if kinds != ["lora"] or other:
        why = f"diffusers has LoRA, and this delta is {other or ' and '.join(kinds)}"
    elif full:
        why = f"it trains {full[0]} in full, for which diffusers has no place"
    elif embedding is not None:
        why = f"{embedding.path} is an embedding, where diffusers loads no LoRA"
    if why:
        raise writing.impossible(why)
