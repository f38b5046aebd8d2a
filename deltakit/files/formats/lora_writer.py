"""LoRA as PEFT and diffusers save it: one rank and one alpha for all, where nothing else is said.

Some servers read nothing else. So LoRAs that differ are padded with zeros to the largest rank, and their scales are multiplied
into B, which changes no output; of different dropouts the largest is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltakit.core import Site, names_by_id, split_slice, tensors_of
from deltakit.files.formats.dora import written_magnitudes
from deltakit.files.formats.layers import LAYERS_OF_LORA, differs, refuse_layer, target_options
from deltakit.files.formats.lora import LORA, LORA_OF_EMBEDDINGS
from deltakit.files.formats.writing import Writing


class _Factors(NamedTuple):
    """One LoRA on a module: A [r, d_in] and B [d_out, r] over all of its features, and the method that it is of."""

    a: Tensor
    b: Tensor
    method: Any


def lora_of(writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config of a delta's LoRAs, and their tensors by the names that PEFT has without its prefix.

    Raises:
        CheckpointError: if PEFT has no such LoRA.
    """
    by_path: dict[str, list[_Factors]] = {}
    targets: dict[str, nn.Module] = {}
    attachment = writing.attachment
    names = names_by_id(tensors_of(attachment.backbone))
    for site in attachment.sites:
        if writing.method(site) != "lora":
            continue
        _refuse_parameters(writing, site, names)
        refuse_layer(writing, site, LAYERS_OF_LORA)
        if differs(site.target):
            raise writing.impossible(
                f"{site.path} {differs(site.target)}, where the LoRA of {writing.library} computes something else"
            )
        a, b, method = _factors(writing, site)
        part = getattr(site.module, "feature_slice", None)
        b = part.spread(b.mT).mT if part is not None else b
        by_path.setdefault(site.owner, []).append(_Factors(a, b, method))
        targets[site.owner] = site.target
    every = [one for factors in by_path.values() for one in factors]
    method = every[0].method
    options = {"r": method.r, "lora_alpha": method.alpha, "use_rslora": method.rslora}
    alike = len({(one.method.r, one.method.alpha, one.method.rslora) for one in every}) == 1
    if not alike or len(every) > len(by_path):
        r = max(sum(len(one.a) for one in factors) for factors in by_path.values())
        options = {"r": r, "lora_alpha": r, "use_rslora": False}
        by_path = {path: [_Factors(*_sum(factors, r), method)] for path, factors in by_path.items()}
    found = written_magnitudes(writing)
    if found:
        options["use_dora"] = True
    for path, (one,) in by_path.items():
        found |= _named(path, targets[path], one.a, one.b)
    return {
        **options,
        "lora_dropout": max(one.method.dropout for one in every),
        "bias": "none",
        **target_options(attachment.backbone, targets),
    }, found


def _factors(writing: Writing, site: Site) -> tuple[Tensor, Tensor, Any]:
    """Returns A and B of a LoRA, and its method. With a start whose product is subtracted, both have twice its rank."""
    method: Any = writing.attachment.record.methods[site.method]
    a, b = (writing.tensor(site, name) for name in "AB")
    if writing.attachment.named(site, "A0") not in writing.tensors:
        return a, b, method
    a = torch.cat([a, writing.tensor(site, "A0")])
    b = torch.cat([b, -writing.tensor(site, "B0")], 1)
    return a, b, replace(method, r=len(a), alpha=method.scaling * len(a), rslora=False, start="kaiming")


def _sum(factors: Sequence[_Factors], r: int) -> tuple[Tensor, Tensor]:
    """Returns the factors of the sum of several LoRAs, with the scales in B, padded with zeros to a rank."""
    a = torch.cat([one.a for one in factors])
    b = torch.cat([one.b * one.method.scaling for one in factors], 1)
    return F.pad(a, (0, 0, 0, r - len(a))), F.pad(b, (0, r - len(a)))


def _named(path: str, target: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    names = LORA_OF_EMBEDDINGS if isinstance(target, nn.Embedding) else LORA
    kernel = getattr(target, "kernel_size", ())
    if isinstance(target, nn.modules.conv._ConvNd):
        a, b = a.unflatten(1, (-1, *kernel)), b[(..., *([None] * len(kernel)))]
    return {f"{path}{suffix}": {"A": a, "B": b}[ours] for suffix, ours in names.items()}


def _refuse_parameters(writing: Writing, site: Site, names: Mapping[int, Sequence[str]]) -> None:
    parameter = split_slice(site.module.part)[0] if not site.module.part.startswith("[") else ""
    weight = site.target._parameters.get("weight")
    if parameter not in ("", "weight") or weight is None:
        raise writing.impossible(f"{site.path} is a parameter, and deltakit writes LoRA of modules alone")
    tied = names[id(weight)]
    if parameter and len(tied) > 1:
        raise writing.impossible(f"{tied[0]} and {tied[1]} are one weight here, and two in {writing.library}")
