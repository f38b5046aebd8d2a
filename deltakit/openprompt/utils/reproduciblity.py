"""Seeds. The file has OpenPrompt's name."""

import random

import numpy as np
import torch


def set_seed(seed: int | None = None) -> None:
    """Seeds the generators of Python, NumPy and torch; None does nothing."""
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
