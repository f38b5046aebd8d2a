"""The hook by which a backbone with deltas loads the checkpoints of training frameworks."""

from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, WeakSet, ref

from torch import nn

from deltakit.delta.training_state import load_checkpoint
from deltakit.delta.whole_checkpoints import take_mark
from deltakit.files import deltas_in


class SavedBackbone:
    """What the `Saver`s of one backbone share: the backbone, and the modules that have a `Saver`.

    It is pickled and copied without either. Whoever copies a part of the backbone gets that part alone.
    """

    def __init__(self) -> None:
        self.root: ReferenceType[nn.Module] | None = None
        self.modules: WeakSet[nn.Module] = WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return SavedBackbone, ()

    def root_of(self, module: nn.Module) -> nn.Module:
        """Returns the backbone of one of the modules; the module itself if it was copied alone."""
        found = self.root() if self.root is not None else None
        return module if found is None else found


class LoadCheckpoint:
    """Stands on a backbone with deltas, and loads checkpoints that hold only what they train instead of torch.

    All others it leaves to torch. Of those that hold the whole model it compares the mark.
    """

    def __init__(self, backbone: nn.Module, saved: SavedBackbone) -> None:
        self.saved = saved
        saved.root = ref(backbone)
        self._loaded: str | None = None
        """The prefix of the backbone in the state dict that is being loaded, if that is a checkpoint of deltas."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the backbone gets one for itself.
        return LoadCheckpoint, (self.saved.root() if self.saved.root is not None else None, self.saved)

    def before(self, backbone: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Loads the checkpoint, and takes it out of the state dict."""
        self._loaded = None
        if deltas_in(state, prefix):
            own: Mapping[str, Any] = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
            load_checkpoint(backbone, {key.removeprefix(prefix): value for key, value in own.items()})
            self._loaded = prefix
        else:
            take_mark(backbone, state, prefix)

    def after(self, backbone: nn.Module, found: Any) -> None:
        """Removes the backbone's own keys, which such a checkpoint does not have, from the missing ones."""
        if self._loaded is not None:
            found.missing_keys[:] = [key for key in found.missing_keys if not key.startswith(self._loaded)]
            self._loaded = None
