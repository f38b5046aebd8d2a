"""Flux in kohya's files: the names of the original repository, where one linear layer computes what diffusers has as several.

The factor A of such a layer is that of each part, and the rows of B are those of the parts in turn.
"""

import re
from collections.abc import Sequence

from torch import Tensor

from deltakit.core import linear_sizes
from deltakit.files.formats.images.names import Names
from deltakit.files.formats.images.parts import Layer, Part

_ATTENTION = {
    "img": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_DOUBLE = {
    "img_attn_qkv": _ATTENTION["img"],
    "txt_attn_qkv": _ATTENTION["txt"],
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": (*_ATTENTION["img"], "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_BLOCKS = {"double": ("transformer_blocks", _DOUBLE), "single": ("single_transformer_blocks", _SINGLE)}
"""The layers of the two kinds of blocks, and diffusers' layers that they are."""

_OF_ROWS = ("B", "dora_scale", "weight", "bias", "hada_w1_a", "hada_w2_a")
"""The tensors that have a row for each output."""

_NAME = re.compile(r"(double|single)_blocks_(\d+)_(\w+)")


def unfused(part: Part, names: Names) -> Part:
    """Returns a part of a file with the names that diffusers has, if the backbone has those and the part does not."""
    found = Part(part.component, strange=part.strange)
    for name, layer in part.layers.items():
        for own in _split(layer, _paths(name, names) if layer.flat else (), names) or [layer]:
            found.layers[own.name] = own
    return found


def _paths(name: str, names: Names) -> Sequence[str]:
    match = _NAME.fullmatch(name)
    blocks, layers = _BLOCKS[match[1]] if match is not None else ("", {})
    paths = [f"{blocks}.{match[2]}.{path}" for path in layers.get(match[3], ())] if match is not None else []
    return paths if all(path in names.modules for path in paths) else []


def _split(layer: Layer, paths: Sequence[str], names: Names) -> list[Layer]:
    """Returns a layer as one for each path; [] if its rows are not those of the modules there."""
    sizes = [linear_sizes(names.modules[path]) for path in paths]
    rows = [size[1] for size in sizes if size is not None]
    pieces = {
        name: tensor.split(rows) if name in _OF_ROWS else [tensor] * len(rows)
        for name, tensor in layer.tensors.items()
        if name not in _OF_ROWS or _has_rows(tensor, rows)
    }
    if not paths or len(rows) != len(paths) or pieces.keys() != layer.tensors.keys():
        return []
    return [
        Layer(path, False, {name: each[number] for name, each in pieces.items()}) for number, path in enumerate(paths)
    ]


def _has_rows(tensor: Tensor, rows: Sequence[int]) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == sum(rows)
