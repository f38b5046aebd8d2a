"""State dicts of modules that stand around backbones with deltas, such as a LightningModule or a `PromptModel`."""

from typing import Any

from torch import nn

from deltakit.delta import checkpoint_tensors, deltas, trains_only_deltas, whole_checkpoint_mark


def inner_backbones(module: nn.Module) -> dict[nn.Module, list[str]]:
    """Returns the backbones with deltas in a module, each with its paths there. The path of the module itself is ""."""
    found: dict[nn.Module, list[str]] = {delta.backbone: [] for delta in deltas(module)}
    # A backbone may stand at several places: the models of an `Ensemble` share one.
    for path, child in module.named_modules(remove_duplicate=False):
        if child in found:
            found[child].append(path)
    return found


def shrink(module: nn.Module, state: dict[str, Any]) -> None:
    """Leaves of the backbones with deltas in a module only what the deltas train, in a state dict of the module."""
    for backbone, paths in inner_backbones(module).items():
        prefixes = [f"{path}." if path else "" for path in paths]
        if not trains_only_deltas(backbone):
            for prefix in prefixes:
                state.update(whole_checkpoint_mark(backbone, prefix))
            continue
        taken = {key: state.pop(key) for key in list(state) if key.startswith(tuple(prefixes))}
        given = {key.removeprefix(prefixes[0]): value for key, value in taken.items() if key.startswith(prefixes[0])}
        small = checkpoint_tensors(backbone, given)
        for prefix in prefixes:
            # Each its own copy: safetensors refuses tensors that share memory.
            state.update({prefix + key: value.clone() for key, value in small.items()})
