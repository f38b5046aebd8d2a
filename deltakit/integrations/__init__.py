"""Lines for training frameworks: for checkpoints that hold only what deltas train, and for methods that take steps.

Checkpoints need one in Trainers of plain modules and of sentence-transformers, accelerate, and Lightning.
"""

from deltakit.integrations.accelerate_states import small_states
from deltakit.integrations.lightning_callback import lightning_callback
from deltakit.integrations.trainer_checkpoints import small_checkpoints
from deltakit.integrations.trainer_steps import training_steps

__all__ = ["lightning_callback", "small_checkpoints", "small_states", "training_steps"]
