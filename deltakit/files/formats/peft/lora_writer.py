"""Writes what PEFT's LoRA has and diffusers' has not: LoRA on parameters such as stacks of experts, and biases beside B."""

from typing import Any

from torch import Tensor, nn

from deltakit.core import Site, is_conv1d, join, name_of, tensors_of
from deltakit.files.formats.lora import LORA, Scale
from deltakit.files.formats.lora_writer import Stacks, lora_of
from deltakit.files.formats.peft.keys import LORA_BIAS
from deltakit.files.formats.peft.parameters import INNER
from deltakit.files.formats.writing import Writing

BIAS = "bitfit"
"""The method whose biases PEFT has beside the factor B of a LoRA."""


def peft_lora_of(writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config of a delta's LoRAs with their biases, and their tensors by PEFT's names without its prefix.

    Raises:
        CheckpointError: if PEFT has no such LoRA.
    """
    options, named = lora_of(writing, _on_parameters)
    biases = _biases(writing)
    if not biases:
        return options, named
    beside = {
        "use_dora": "DoRA",
        "alora_invocation_tokens": "activated LoRA",
        "target_parameters": "LoRA on parameters",
    }
    for option, what in beside.items():
        if options.get(option):
            raise writing.impossible(f"it has biases beside {what}, which PEFT does not have together")
    scale = Scale(options["lora_alpha"], options["use_rslora"]).factor(options["r"])
    (factor,) = (suffix for suffix, ours in LORA.items() if ours == "B")
    (suffix,) = LORA_BIAS
    with_lora = {key.removesuffix(factor): named[key] for key in named if key.endswith(factor)}
    alone = next((path for path in biases if path not in with_lora), None)
    if alone is not None:
        raise writing.impossible(f"it has a bias on {alone}, and PEFT has biases only beside a LoRA of the same layer")
    if len(with_lora) < sum("lora_" in key for key in named) / 2:
        raise writing.impossible("it has biases beside the LoRA of an embedding, which PEFT does not have together")
    if not scale:
        raise writing.impossible("PEFT multiplies the biases by the LoRA's alpha, which is 0")
    for path, b in with_lora.items():
        # PEFT has a bias at all of them, or at none.
        named[f"{path}{suffix}"] = biases[path] / scale if path in biases else b.new_zeros(len(b))
    return {**options, "lora_bias": True}, named


def _biases(writing: Writing) -> dict[str, Tensor]:
    """Returns the biases [d_out] over all features of their modules, by the modules' paths."""
    found: dict[str, Tensor] = {}
    for site in writing.attachment.sites:
        if writing.method(site) != BIAS:
            continue
        if site.module.part and not site.module.part.startswith("["):
            raise writing.impossible(f"it has a bias on {site.path}, and PEFT has biases on modules alone")
        bias, part = writing.tensor(site, "bias"), getattr(site.module, "feature_slice", None)
        bias = bias if part is None else part.spread(bias)
        found[site.owner] = found[site.owner] + bias if site.owner in found else bias
    return found


def _on_parameters(writing: Writing, stacks: Stacks) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config and the tensors of LoRAs on parameters.

    Raises:
        CheckpointError: if PEFT would compute something else, or cannot wrap the module of one.
    """
    sites, named = writing.attachment.sites, dict[str, Tensor]()
    other = next((site for site in sites if writing.method(site) == "lora" and is_conv1d(site.target)), None)
    if other is not None:
        raise writing.impossible(f"{other.path} is a Conv1D, and PEFT has no LoRA on parameters beside one")
    for path, (site, a, b) in stacks.items():
        _refuse_parameter(writing, site, path)
        wrapped = [name for name in site.target._parameters if join(site.owner, name) in stacks]
        # The wrapper of the first is the innermost.
        place = site.owner + INNER * (len(wrapped) - 1 - wrapped.index(name_of(path)))
        # The columns of B have the stack within the rank, unlike the rows of A.
        factors = {"A": a.flatten(0, -2), "B": b.movedim(0, -1).flatten(1) if b.ndim > 2 else b}
        named |= {f"{place}{suffix}": factors[ours] for suffix, ours in LORA.items()}
    # PEFT has no dropout on parameters. It changes no output of a trained adapter. The version says which of the factors of a
    # stack is A (see `parameters.stacked`).
    config = {"target_parameters": list(stacks), "lora_dropout": 0.0, "fan_in_fan_out": False, "peft_version": "0.19.0"}
    return config, named


def _refuse_parameter(writing: Writing, site: Site, path: str) -> None:
    """Refuses a parameter on which PEFT would have no effect or another one, or whose module it cannot wrap."""
    held, read = site.target._parameters[name_of(path)], site.module.weight_read
    if held is None or held.ndim > 3 or (held.ndim == 2 and getattr(site.target, "is_transposed", False)):
        shape = "none" if held is None else f"shape {tuple(held.shape)}"
        raise writing.impossible(f"{path} has {shape}, and PEFT has LoRA on matrices and stacks of them")
    if read is None or all(other.holder for other in (read, *read.also)):
        raise writing.impossible(f"another module reads {path}, where PEFT has no effect")
    if not site.owner or isinstance(site.target, nn.MultiheadAttention):
        kind = type(site.target).__name__
        raise writing.impossible(f"{path} is a parameter of a {kind}, which PEFT cannot put into a wrapper")
    same = next((name for name, _ in tensors_of(writing.attachment.backbone) if name.endswith(f".{path}")), None)
    if same is not None:
        raise writing.impossible(f"it has LoRA on {path}, and PEFT would also take {same}")
