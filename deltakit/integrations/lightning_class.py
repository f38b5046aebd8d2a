"""The callback's class, which needs Lightning to be defined."""

from typing import Any

from deltakit.integrations.inner_backbones import shrink

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback


class SmallCheckpoints(Callback):
    """Leaves only what deltas train in the state dict of a checkpoint."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        shrink(pl_module, checkpoint["state_dict"])
