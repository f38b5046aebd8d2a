"""Penalties and steps of deltas in a transformers `Trainer`, whose loop the user does not write."""

from types import MethodType
from typing import Any, TypeVar

from torch import Tensor

from deltakit.core import checked
from deltakit.delta import deltas
from deltakit.errors import OptionError

T = TypeVar("T")


@checked
def training_steps(trainer: T) -> T:
    """Makes a `Trainer` call `penalty()` and `step()` of all deltas on its model, and returns the trainer.

    AdaLoRA needs it. The penalties are added to the loss in training, and not in evaluation.

    Raises:
        OptionError: if this is no `Trainer`.
    """
    kind: Any = type(trainer)
    absent = [name for name in ("compute_loss", "add_callback") if not callable(getattr(kind, name, None))]
    if absent:
        raise OptionError(
            f"training_steps: expected a transformers.Trainer, found a {kind.__name__}, which has no {absent[0]}; pass the "
            "trainer before calling train()"
        )
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for delta in deltas(one.model):
                delta.step()

    one: Any = trainer
    one.add_callback(Steps())
    one.compute_loss = MethodType(_compute_loss, one)
    return trainer


def _compute_loss(trainer: Any, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
    found = type(trainer).compute_loss(trainer, model, inputs, return_outputs=return_outputs, **options)
    if not model.training:
        return found
    loss: Tensor = found[0] if return_outputs else found
    penalty = sum((delta.penalty() for delta in deltas(trainer.model)), loss.new_zeros(()))
    if _is_scaled(trainer, options.get("num_items_in_batch")):
        # The trainer adds up the losses of such batches. It divides others by the number of batches in a step.
        penalty = penalty / trainer.current_gradient_accumulation_steps
    return (loss + penalty, *found[1:]) if return_outputs else loss + penalty


def _is_scaled(trainer: Any, items: Any) -> bool:
    """Returns whether the loss of a batch is its share of the loss of a step: as in `Trainer.training_step`."""
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    return bool((trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None)
