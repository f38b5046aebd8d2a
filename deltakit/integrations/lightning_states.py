"""The state dict of a Lightning checkpoint, with only what deltas train of their backbones."""

from typing import Any

from torch import nn

from deltakit.delta import checkpoint_tensors, deltas, trains_only_deltas, whole_checkpoint_mark


def shrink(module: nn.Module, state: dict[str, Any]) -> None:
    """Leaves of the backbones with deltas in a module only what the deltas train, in a state dict of the module."""
    paths = {id(child): path for path, child in module.named_modules()}
    for backbone in dict.fromkeys(delta.backbone for delta in deltas(module)):
        prefix = f"{paths[id(backbone)]}." if paths[id(backbone)] else ""
        if trains_only_deltas(backbone):
            given = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
            state.update({prefix + key: value for key, value in checkpoint_tensors(backbone, given).items()})
        else:
            state.update(whole_checkpoint_mark(backbone, prefix))
