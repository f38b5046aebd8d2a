"""The names of the files of image models, and of the tensors in them.

A tensor's key has the component of the pipeline, the path of a module and what the tensor is. diffusers has written three
spellings since 2023; kohya's sd-scripts and LyCORIS write paths with underscores in place of the dots.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

TENSORS, PICKLE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
FILES = (TENSORS, PICKLE)
METADATA = "lora_adapter_metadata"
"""The entry of a safetensors file of diffusers that holds the config of each component's LoRA."""

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
"""The tensors of LyCORIS's other products than LoRA's. They keep their names here."""

_ENDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    # Behind the name of a projection, `processor.to_q_lora.down.weight`.
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".diff": "weight",
    ".diff_b": "bias",
    ".w_norm": "weight",
    ".b_norm": "bias",
    **{f".{name}": name for name in (*LOHA, *LOKR)},
}
"""The end of a key: the name of the tensor here. `weight` and `bias` are added to those of the module."""

_ABSENT = (
    (re.compile(r"\.lora_magnitude_vector(\.weight)?$"), "DoRA of PEFT"),
    (re.compile(r"\.oft_\w+(\.weight)?$"), "OFT"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA"),
    (re.compile(r"\.lambda_layer$"), "T-LoRA"),
    (re.compile(r"\.on_input$"), "IA3 of LyCORIS"),
    (re.compile(r"\.lora_(B|up)\.bias$"), "biases of B"),
)
"""The ends of keys that tell what deltakit does not have."""

_PEFT = "base_model.model."
_FLAT = re.compile(r"(lora_(?:unet|te\d?|transformer|prior|controlnet)|lycoris)_([^.]+)(?:\..*)?")
_COMPONENT = re.compile(r"((?:unet|transformer|text_encoder|prior|controlnet)(?:_\d)?)\.(.+)")


class Key(NamedTuple):
    """What the key of a tensor says."""

    component: str
    """The prefix of the pipeline's component; "" without one."""
    module: str
    """The path of the module, or its name with underscores."""
    tensor: str
    """What the tensor is: A, B, mid, alpha, dora_scale, weight, bias, or a tensor of `LOHA` or `LOKR`; "" if the key has no
    known end."""
    flat: bool


def read_key(key: str) -> Key:
    """Returns what a key says.

    >>> read_key("unet.mid_block.attentions.0.proj_in.lora_A.weight")
    Key(component='unet', module='mid_block.attentions.0.proj_in', tensor='A', flat=False)
    >>> read_key("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha")
    Key(component='lora_te1', module='text_model_encoder_layers_0_mlp_fc1', tensor='alpha', flat=True)
    """
    end = next((end for end in _ENDS if key.endswith(end)), "")
    # PEFT's prefix, which some trainers keep.
    name = key.removesuffix(end).removeprefix(_PEFT)
    flat = _FLAT.fullmatch(name)
    if flat is not None:
        return Key(flat[1], flat[2], _ENDS.get(end, ""), True)
    dotted = _COMPONENT.fullmatch(name)
    component, module = (dotted[1], dotted[2]) if dotted is not None else ("", name)
    # The attention processors of diffusers held the first LoRAs.
    return Key(component, module.replace(".processor.", "."), _ENDS.get(end, ""), False)


def absent(key: str) -> str:
    """Returns which method that deltakit does not have the key of a tensor tells; "" if none."""
    return next((what for pattern, what in _ABSENT if pattern.search(key)), "")


def spelling(keys: Iterable[str]) -> str:
    """Returns who spells keys so: "kohya" or "diffusers"; "" if they are of no LoRA."""
    keys = [*keys]
    if any(key.startswith(_PEFT) for key in keys):
        # Without its config the scale of an adapter of PEFT is unknown. diffusers' own files have no such prefix.
        return ""
    found = {read_key(key).flat for key in keys if read_key(key).tensor or absent(key)}
    return ("kohya" if True in found else "diffusers") if found else ""
