"""Reads and writes PEFT's adaption prompts, which are those of LLaMA-Adapter."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltakit.core import Site, name_of, own_modules
from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.peft.keys import ADAPTION
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing

METHOD = "llama_adapter"
_MODELS = ("llama", "mistral")
"""The types of models in which PEFT computes what deltakit does."""


def read_adaption(source: Source, parts: Parts) -> None:
    """Adds the prompts and gates of an adapter to the parts.

    Raises:
        CheckpointError: if a prompt has no gate or another shape, or the model is GPT-2.
    """
    kind = getattr(getattr(source.backbone, "config", None), "model_type", None)
    if kind == "gpt2":
        raise CheckpointError(
            f"{source.folder}: in GPT-2, PEFT adds its prompts behind the attention's output projection, and deltakit before "
            "it, as the paper does; train a LlamaAdapter"
        )
    for path, part in source.by_path(ADAPTION).items():
        prompt, gate = part.get("prompt"), part.get("gate")
        if prompt is None or gate is None or prompt.ndim != 3 or len(prompt) != 1 or gate.shape != (1,):
            raise CheckpointError(
                f"{source.folder}: {' and '.join(ADAPTION)} of {path} do not fit together; save or download it again"
            )
        parts.add(METHOD, {"tokens": prompt.shape[1]}, path, {"prompt": prompt[0], "gate": gate})


def adaption_options(writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config and the tensors of the prompts and gates of a delta.

    Raises:
        CheckpointError: if PEFT has no such prompts, or would compute something else.
    """
    attachment = writing.attachment
    kind = getattr(getattr(attachment.backbone, "config", None), "model_type", None)
    if kind not in _MODELS:
        raise writing.impossible(f"PEFT has adaption prompts for {' and '.join(_MODELS)}, and this model is {kind}")
    if attachment.record.fully_trained:
        raise writing.impossible(f"it trains {attachment.record.fully_trained[0]}, and PEFT trains nothing beside them")
    order = {path: number for number, (path, _) in enumerate(own_modules(attachment.backbone))}
    sites = sorted(attachment.sites, key=lambda site: order[site.path])
    for site in sites:
        _refuse(writing, site)
    name = name_of(sites[0].path)
    _refuse_others(writing, sites, [path for path in order if path.endswith(f".{name}")])
    prompts = {site.path: writing.tensor(site, "prompt") for site in sites}
    lengths = sorted({len(prompt) for prompt in prompts.values()})
    if len(lengths) > 1:
        raise writing.impossible(
            f"its prompts have {lengths[0]} and {lengths[1]} tokens, and PEFT has one length for all"
        )
    (of_prompt, of_gate), tensors = ADAPTION, {}
    for site in sites:
        tensors[f"{site.path}{of_prompt}"] = prompts[site.path][None]
        tensors[f"{site.path}{of_gate}"] = writing.tensor(site, "gate")
    return {"target_modules": name, "adapter_len": lengths[0], "adapter_layers": len(sites)}, tensors


def _refuse_others(writing: Writing, sites: Sequence[Site], paths: Sequence[str]) -> None:
    """Refuses other targets than the last ones of a name: PEFT counts them from the last one."""
    found = [site.path for site in sites]
    if found != paths[-len(found) :]:
        missing = next(path for path in paths[-len(found) :] if path not in found)
        raise writing.impossible(f"PEFT has prompts in the last layers, and {missing} has none")


def _refuse(writing: Writing, site: Site) -> None:
    """Refuses an attention in which PEFT computes something else than the paper."""
    attention: Any = site.target
    heads, of_keys = attention.config.num_attention_heads, attention.config.num_key_value_heads
    key: nn.Linear = attention.k_proj
    if key.in_features // key.out_features * of_keys != heads:
        raise writing.impossible(
            f"PEFT takes {key.in_features} // {key.out_features}, the sizes of {site.path}.k_proj, for the number of heads "
            f"that share one key, and there are {heads} heads and {of_keys} keys"
        )
    if attention.o_proj.bias is not None:
        raise writing.impossible(f"{site.path}.o_proj has a bias, which PEFT would add twice")
