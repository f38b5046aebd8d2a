"""The hooks on the state dicts of a backbone with deltas: those that save it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from deltakit.core import deltas_left_out, without_deltas
from deltakit.injection.narrowed_state_dict import whole_state_dict
from deltakit.injection.tables import stand


class OwnValues:
    """A hook that puts the backbone's own values into state dicts that are made without deltas.

    Args:
        values: by the names that they have in the module of the hook.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        # The state dicts of other threads keep the trained values.
        if deltas_left_out():
            state.update({prefix + name: value for name, value in self.values.items() if prefix + name in state})


@contextmanager
def own_state_dicts(module: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
    """In this block and thread, state dicts of a module have no tensors of deltas, and the backbone's own values.

    Args:
        own: these values, by the names that they have in the module.
    """
    handle = module.register_state_dict_post_hook(OwnValues(own)) if own else None
    try:
        with without_deltas(), whole_state_dict():
            yield
    finally:
        if handle is not None:
            handle.remove()


def hook_state_dicts(module: nn.Module, kind: type[Any], *, wanted: bool) -> None:
    """Registers a hook of this class on the state dicts of a module, or removes it."""
    stand(kind, module, module.register_state_dict_post_hook, wanted=wanted)
