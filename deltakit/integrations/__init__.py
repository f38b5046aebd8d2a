"""Lines for training frameworks, where checkpoints need one to hold only what deltas train.

These are Trainers of plain modules and of sentence-transformers, accelerate, and Lightning.
"""

from deltakit.integrations.accelerate_states import small_states as small_states
from deltakit.integrations.lightning_callback import lightning_callback as lightning_callback
from deltakit.integrations.trainer_checkpoints import small_checkpoints as small_checkpoints
