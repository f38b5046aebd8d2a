"""State dicts with one name for each tensor.

`Trainer` saves models of other classes than transformers' own with safetensors, which refuses tensors under two names, and
most language models tie the head to the embedding. So the state dict of a prompt model has the first name alone, and loading
it gives the value to all names.
"""

from typing import Any

from torch import nn


def name_tied_once(module: nn.Module) -> None:
    """Makes a module's state dict have each tensor under its first name only. It loads as before, also with `strict=True`."""
    module.register_state_dict_post_hook(_drop_others)
    module.register_load_state_dict_pre_hook(_add_others)


def _drop_others(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for _, *others in _groups(module):
        for name in others:
            state.pop(prefix + name, None)


def _add_others(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for first, *others in _groups(module):
        if prefix + first in state:
            for name in others:
                state.setdefault(prefix + name, state[prefix + first])


def _groups(module: nn.Module) -> list[list[str]]:
    """The names of tensors that have several."""
    found: dict[int, list[str]] = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            found.setdefault(id(tensor), []).append(name)
    return [names for names in found.values() if len(names) > 1]
