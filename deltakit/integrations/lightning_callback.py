"""Lightning checkpoints that hold only what deltas train."""

from typing import Any

from deltakit.core import checked
from deltakit.errors import OptionError


@checked
def lightning_callback() -> Any:
    """Returns a callback for Lightning's `Trainer`: its checkpoints hold only what the deltas of the module train.

    Loading needs no callback: `Trainer.fit(module, ckpt_path=...)` finds the attached deltas. The rest of the module is saved
    as before, and so is a model that trains more than its deltas.

    Raises:
        OptionError: if neither `lightning` nor `pytorch_lightning` is installed.
    """
    try:
        from deltakit.integrations.lightning_class import SmallCheckpoints
    except ImportError as error:
        raise OptionError("lightning_callback: Lightning is not installed; pip install lightning") from error
    return SmallCheckpoints()
