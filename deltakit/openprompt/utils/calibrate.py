"""Contextual calibration."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deltakit.errors import OptionError


@torch.no_grad()
def calibrate(prompt_model: Any, dataloader: Iterable[Any]) -> Tensor:
    """Returns the mean logits in the slot [vocabulary] over the examples of a loader, for `register_calibrate_logits`.

    Args:
        prompt_model: a `PromptForClassification`.
        dataloader: batches of unlabelled or content-free examples.

    Raises:
        OptionError: if there are no batches.
    """
    training = prompt_model.training
    prompt_model.eval()
    found = [prompt_model.forward_without_verbalize(batch.to(prompt_model.device)) for batch in dataloader]
    prompt_model.train(training)
    if not found:
        raise OptionError("calibrate: the dataloader has no batches")
    return torch.cat(found).mean(0)
