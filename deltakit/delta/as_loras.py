"""Writes methods that other formats do not have, or have with another meaning, as the LoRAs that they amount to."""

import copy
from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from deltakit.core import Attachment, DeltaModule, Method, Site, without_start_values
from deltakit.delta.planning import build
from deltakit.selection import BackboneIndex


def as_loras(attachment: Attachment, state: Mapping[str, Tensor]) -> tuple[Attachment, dict[str, Tensor]]:
    """Returns a delta with LoRAs in the place of the methods with `lora_elsewhere`, and its tensors, for a writer.

    Args:
        state: the tensors of the delta's file.
    """
    methods = attachment.record.methods
    found = [method for method in methods if not method.lora_elsewhere]
    if len(found) == len(methods):
        return attachment, dict(state)
    index = BackboneIndex(attachment.backbone)
    sites, values = list[Site](), list[Mapping[str, Tensor]]()
    for site in attachment.sites:
        method, module = methods[site.method], site.module
        own: Mapping[str, Tensor] = {name: state[attachment.named(site, name)] for name in module.saved_state()}
        if method.lora_elsewhere:
            method, module = _lora(index, method, site, own)
            own = module.saved_state()
            found.append(method)
        number = next(number for number, other in enumerate(found) if other is method)
        sites.append(site._replace(module=module, method=number))
        values.append(own)
    written = Attachment(attachment.backbone, replace(attachment.record, methods=tuple(found)), sites)
    tensors = {name: state[name] for name in attachment.record.fully_trained if name in state}
    for site, own in zip(sites, values, strict=True):
        tensors |= {written.named(site, name): value for name, value in own.items()}
    return written, tensors


def _lora(index: BackboneIndex, method: Method, site: Site, values: Mapping[str, Tensor]) -> tuple[Method, DeltaModule]:
    # The values come from the state: a process may have only a part of the module's own.
    filled = copy.copy(site.module)
    filled.__dict__["_parameters"] = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    lora = type(method).combination([filled], None)
    kept = {field.name for field in fields(lora)} & {"dropout", "untie"}
    lora = replace(lora, **{name: getattr(method, name) for name in kept if hasattr(method, name)})
    with torch.no_grad(), without_start_values():
        (module,) = build(index, lora, [index.target(site.path)]).values()
        module.take_sum([(1.0, filled)])
    return lora, module
