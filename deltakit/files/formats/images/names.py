"""Finds the modules of a backbone by the names that files of image models have for them."""

import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from deltakit.core import own_modules
from deltakit.errors import CheckpointError

_UNET_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""The modules of the UNet of the Stable Diffusion repository, and of diffusers' one."""

_UNET_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)")
_UNET_MIDDLE = re.compile(r"middle_block_([012])_(.+)")
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
# Of text encoders, in the first files of diffusers.
_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Names:
    """The modules of a backbone that have a weight, by their paths, also with underscores in place of the dots."""

    def __init__(self, backbone: nn.Module, place: Path) -> None:
        """
        Args:
            place: the file, for error messages.
        """
        self._place = place
        self.backbone = type(backbone).__name__
        self.modules = {path: module for path, module in own_modules(backbone) if hasattr(module, "weight")}
        self._flat: dict[str, list[str]] = {}
        for path in self.modules:
            self._flat.setdefault(path.replace(".", "_"), []).append(path)
        layers = re.compile(r"down_blocks\.0\.resnets\.(\d+)\.")
        self._layers = len({found[1] for found in map(layers.match, self.modules) if found is not None})

    def path(self, component: str, name: str, flat: bool) -> str | None:
        """Returns the path of the module that a file names; None if there is none.

        Raises:
            CheckpointError: if a name with underscores means two modules.
        """
        if not flat:
            return next((path for path in _dotted(component, name) if path in self.modules), None)
        found = next((self._flat[other] for other in self._with_underscores(name) if other in self._flat), [])
        if len(found) > 1:
            raise CheckpointError(
                f"{self._place}: {name} is the name of two modules of this backbone: {found[0]} and {found[1]}; use it in the "
                "library that it was trained with"
            )
        return found[0] if found else None

    def _with_underscores(self, name: str) -> Iterator[str]:
        yield name
        yield from _text_model(name, "_")
        if self._layers:
            yield _of_diffusers(name, self._layers)


def _dotted(component: str, name: str) -> Iterator[str]:
    for path in (name, *_text_model(name, ".")):
        yield path
        owner, _, last = path.rpartition(".")
        if last == "to_out":
            yield f"{path}.0"
        if last in _TEXT_ATTENTION:
            yield f"{owner}.{_TEXT_ATTENTION[last]}"
    if component:
        # Then it is no component, but a module of the backbone with the name of one.
        yield f"{component}.{name}"


def _text_model(name: str, dot: str) -> Iterator[str]:
    # transformers 5 has taken this level out of CLIPTextModel, and not out of CLIPTextModelWithProjection.
    level = f"text_model{dot}"
    yield name.removeprefix(level) if name.startswith(level) else level + name


def _of_diffusers(name: str, layers: int) -> str:
    """Returns a name of Stable Diffusion's UNet as diffusers' UNet has it; both with underscores.

    >>> _of_diffusers("input_blocks_4_1_proj_in", 2), _of_diffusers("output_blocks_2_2_conv", 2)
    ('down_blocks_1_attentions_0_proj_in', 'up_blocks_0_upsamplers_0_conv')

    Args:
        layers: the number of residual layers in a block of the first half. Those of the second half have one more.
    """
    if name in _UNET_ENDS:
        return _UNET_ENDS[name]
    block, middle = _UNET_BLOCK.fullmatch(name), _UNET_MIDDLE.fullmatch(name)
    if middle is not None:
        return f"mid_block_{_MIDDLE[int(middle[1])]}_{_RESNET.get(middle[2], middle[2])}"
    if block is None:
        return name
    half, number, part, rest = block[1], int(block[2]) - (block[1] == "input"), int(block[3]), block[4]
    where, layer = divmod(number, layers + 1)
    side = f"{'down' if half == 'input' else 'up'}_blocks_{where}"
    if rest in ("op", "conv"):
        return f"{side}_{'downsamplers' if half == 'input' else 'upsamplers'}_0_conv"
    return f"{side}_{'attentions' if part else 'resnets'}_{layer}_{_RESNET.get(rest, rest)}"
