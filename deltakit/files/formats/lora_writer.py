"""LoRA as PEFT and diffusers save it: one rank and one alpha for all, where nothing else is said.

Some servers read nothing else. So LoRAs that differ are padded with zeros to the largest rank, and their scales are multiplied
into B, which changes no output; of different dropouts the largest is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltakit.core import Site, join, names_by_id, split_slice, tensors_of
from deltakit.files.formats.dora import written_magnitudes
from deltakit.files.formats.layers import LAYERS_OF_LORA, differs, in_kernel, pointwise, refuse_layer, target_options
from deltakit.files.formats.lora import LORA, LORA_OF_EMBEDDINGS
from deltakit.files.formats.writing import Writing


class _Factors(NamedTuple):
    """One LoRA: A [*stack, r, d_in] and B [*stack, d_out, r] over all features of its target, and its method."""

    a: Tensor
    b: Tensor
    method: Any


Stacks = Mapping[str, tuple[Site, Tensor, Tensor]]
"""LoRAs on parameters, by the parameters' paths: a delta module, and the factors A [*stack, r, d_in], B [*stack, d_out, r]."""


def lora_of(
    writing: Writing, on_parameters: Callable[[Writing, Stacks], tuple[dict[str, Any], dict[str, Tensor]]] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config of a delta's LoRAs, and their tensors by the names that PEFT has without its prefix.

    Args:
        on_parameters: what returns config and tensors of LoRAs on parameters that are no weight of a layer, such as stacks
            of experts; None if the library has none.

    Raises:
        CheckpointError: if PEFT has no such LoRA.
    """
    by_path: dict[str, list[_Factors]] = {}
    targets: dict[str, nn.Module] = {}
    stacked: dict[str, Site] = {}
    attachment = writing.attachment
    names = names_by_id(tensors_of(attachment.backbone))
    for site in attachment.sites:
        if writing.method(site) != "lora":
            continue
        parameter = _parameter(writing, site, names)
        if parameter and on_parameters is None:
            raise writing.impossible(f"{site.path} is a parameter, and {writing.library} has LoRA of modules alone")
        a, b, method = _factors(writing, site)
        part = getattr(site.module, "feature_slice", None)
        b = part.spread(b.mT).mT if part is not None else b
        path = join(site.owner, parameter) if parameter else site.owner
        by_path.setdefault(path, []).append(_Factors(a, b, method))
        if parameter:
            stacked[path] = site
        else:
            targets[site.owner] = site.target
    options, alone = _alike(by_path)
    invocation = _invocation(writing)
    if invocation:
        options["alora_invocation_tokens"] = invocation
    found = written_magnitudes(writing)
    if found:
        options["use_dora"] = True
    for path, target in targets.items():
        found |= _named(path, target, *alone[path])
    options |= {"bias": "none", **target_options(attachment.backbone, targets)}
    if on_parameters is not None and stacked:
        more, named = on_parameters(writing, {path: (site, *alone[path]) for path, site in stacked.items()})
        options, found = options | more, found | named
    return options, found


def _alike(by_path: Mapping[str, list[_Factors]]) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """Returns the rank, scale and dropout of all LoRAs, and the two factors at each path that have them."""
    every = [one for factors in by_path.values() for one in factors]
    method, dropout = every[0].method, max(one.method.dropout for one in every)
    alike = len({(one.method.r, one.method.alpha, one.method.rslora) for one in every}) == 1
    if alike and len(every) == len(by_path):
        options = {"r": method.r, "lora_alpha": method.alpha, "use_rslora": method.rslora, "lora_dropout": dropout}
        return options, {path: (one.a, one.b) for path, (one,) in by_path.items()}
    r = max(sum(one.a.shape[-2] for one in factors) for factors in by_path.values())
    options = {"r": r, "lora_alpha": r, "use_rslora": False, "lora_dropout": dropout}
    return options, {path: _sum(factors, r) for path, factors in by_path.items()}


def _factors(writing: Writing, site: Site) -> tuple[Tensor, Tensor, Any]:
    """Returns A and B of a LoRA, and its method. With a start whose product is subtracted, both have twice its rank."""
    method: Any = writing.attachment.record.methods[site.method]
    if method.gate:
        raise writing.impossible(f"{site.path} has a gate, and {writing.library} has no LoRA with one")
    a, b = (writing.tensor(site, name) for name in "AB")
    if writing.attachment.named(site, "A0") not in writing.tensors:
        return a, b, method
    a = torch.cat([a, writing.tensor(site, "A0")], -2)
    b = torch.cat([b, -writing.tensor(site, "B0")], -1)
    r = a.shape[-2]
    return a, b, replace(method, r=r, alpha=method.scaling * r, rslora=False, start="kaiming")


def _invocation(writing: Writing) -> list[int]:
    """Returns the ids from which on the LoRAs act on a text; none if they act on all of it.

    Raises:
        CheckpointError: if they do not act on the same tokens.
    """
    methods: Sequence[Any] = writing.attachment.record.methods
    sites = [site for site in writing.attachment.sites if writing.method(site) == "lora"]
    found = {methods[site.method].invocation: site.path for site in sites}
    if len(found) > 1:
        (one, path), (other, other_path), *_ = found.items()
        raise writing.impossible(
            f"{writing.library} has one invocation for all LoRAs, and that of {path} is {list(one)}, that of {other_path} "
            f"{list(other)}"
        )
    return list(*found)


def _sum(factors: Sequence[_Factors], r: int) -> tuple[Tensor, Tensor]:
    """Returns the factors of the sum of several LoRAs, with the scales in B, padded with zeros to a rank."""
    a = torch.cat([one.a for one in factors], -2)
    b = torch.cat([one.b * one.method.scaling for one in factors], -1)
    missing = r - a.shape[-2]
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def _named(path: str, target: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    names = LORA_OF_EMBEDDINGS if isinstance(target, nn.Embedding) else LORA
    factors = {"A": in_kernel(a, target), "B": pointwise(b, target)}
    return {f"{path}{suffix}": factors[ours] for suffix, ours in names.items()}


def _parameter(writing: Writing, site: Site, names: Mapping[int, Sequence[str]]) -> str:
    """Returns the name of the parameter that a LoRA is on; "" if it is written as one of the module.

    Raises:
        CheckpointError: if PEFT's would compute something else.
    """
    parameter = split_slice(site.module.part)[0] if not site.module.part.startswith("[") else ""
    held = site.target._parameters.get(parameter)
    tied = () if held is None else names[id(held)]
    if len(tied) > 1:
        raise writing.impossible(f"{tied[0]} and {tied[1]} are one weight here, and two in {writing.library}")
    if parameter and (parameter != "weight" or not LAYERS_OF_LORA.include(site.target)):
        return parameter
    refuse_layer(writing, site, LAYERS_OF_LORA)
    if differs(site.target):
        raise writing.impossible(
            f"{site.path} {differs(site.target)}, where the LoRA of {writing.library} computes something else"
        )
    return ""
