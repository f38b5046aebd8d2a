"""LoRA as other libraries save it: the names of its tensors, its scale, and how a reader adds it to what it found."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.source import Source

LORA = {".lora_A.weight": "A", ".lora_B.weight": "B"}
LORA_OF_EMBEDDINGS = {".lora_embedding_A": "A", ".lora_embedding_B": "B"}
LORA_MAGNITUDES = {".lora_magnitude_vector": "m"}
"""Each, in the files of PEFT and of diffusers: what stands behind the path of the module, and the tensor in deltakit."""


class Scale(NamedTuple):
    """The options of one LoRA beside its rank, which the factors have."""

    alpha: float
    rslora: bool = False
    dropout: float = 0.0

    def factor(self, r: int) -> float:
        """Returns what the product of factors of a rank is multiplied by."""
        return self.alpha / (math.sqrt(r) if self.rslora else r)


def add_lora(
    source: Source,
    parts: Parts,
    path: str,
    a: Tensor,
    b: Tensor,
    scale: Scale,
    m: Tensor | None = None,
    invocation: tuple[int, ...] = (),
    gate: Mapping[str, Tensor] | None = None,
) -> None:
    """Adds one LoRA with the factors A [r, d_in] and B [d_out, r] to the parts; with magnitudes [d_out], a DoRA.

    Args:
        gate: the tensors of its gate, if it has one.
    """
    if not a.numel() or not b.numel():
        raise CheckpointError(f"{source.folder}: the LoRA of {path} has no values; save or download it again")
    module = source.module(path)
    full = len(a)
    a, b = needed(a, b)
    share = len(a) / full
    options: dict[str, Any] = {
        "r": len(a),
        "alpha": scale.alpha if share == 1 else scale.alpha * (math.sqrt(share) if scale.rslora else share),
        "rslora": scale.rslora,
        # PEFT drops no inputs of embeddings: they are ids.
        "dropout": 0.0 if isinstance(module, nn.Embedding) else scale.dropout,
        # PEFT adapts the module alone, also if its weight is tied.
        "untie": module is not None and source.is_tied(module._parameters.get("weight")),
    }
    if invocation and not isinstance(module, nn.Embedding):
        # In releases of PEFT that have both, the LoRA of embeddings acts on all tokens.
        options["invocation"] = invocation
    tensors = {"A": a, "B": b, **(gate or {})}
    if gate:
        options["gate"] = True
    if m is not None:
        options["dora"], tensors["m"] = True, m
    parts.add("lora", options, path, tensors)


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
