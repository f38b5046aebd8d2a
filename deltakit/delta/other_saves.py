"""Follows the saves of a backbone with deltas that do not come through its `Saver`.

The `Saver` stands on the object. `PreTrainedModel.save_pretrained(model, folder)` does not meet it, and neither do the model
around the backbone and accelerate. They would write the tensors of deltas among those of the model.
"""

from typing import Any

from torch import nn

from deltakit.core import deltas_left_out, records_of, rooted_at
from deltakit.delta.save_job import METHOD, SaveJob, leave_out_deltas, refuse_peft
from deltakit.delta.saver import refuse_part, refuse_upload
from deltakit.delta.whole_checkpoints import whole_checkpoint_mark
from deltakit.errors import StateError, warn
from deltakit.injection import SavingCall, is_narrowed, is_whole_state_dict, saving_call


class OtherSaves:
    """A hook on the state dicts of a backbone with deltas, and of each module in it that has a `Saver`."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        call = None if deltas_left_out() else saving_call(module)
        if call is None:
            return
        if not rooted_at(module):
            if call.model is module and not call.of_accelerate:
                refuse_part(module)
        elif call.of_accelerate:
            _warn(module)
        elif not call.leaves_deltas_out:
            state.update(whole_checkpoint_mark(module, prefix))
        # Otherwise deltakit itself makes this state dict, for a method of the user's.
        elif not is_whole_state_dict():
            _save(module, call, state, prefix)


def _save(root: nn.Module, call: SavingCall, state: dict[str, Any], prefix: str) -> None:
    """Takes the deltas out of a state dict that is being saved, and writes their files beside it.

    Where the backbone is a part of the saved model, they go into a folder with the path of the part.
    """
    refuse_upload(call.arguments)
    is_main = bool(call.arguments.get("is_main_process", True))
    job = SaveJob(root, call.folder, None, is_main, prefix.removesuffix("."))
    refuse_peft(call.model, job)
    if is_narrowed(root) and not prefix:
        raise StateError(
            f"{METHOD}: freeze_module(set_state_dict=True) has narrowed the state dict of this {type(root).__name__}, and the "
            f"model would be written without its weights; call model.{METHOD}(folder)"
        )
    states = job.states()
    leave_out_deltas(root, root, state, prefix)
    job.write(states)


def _warn(root: nn.Module) -> None:
    names = ", ".join(repr(record.name) for record in records_of(root))
    warn(
        f"accelerator.save_model writes the tensors of delta {names} among those of the model; they load only into a model "
        "with the same delta attached, and others drop them; for a model that loads without it call "
        f"accelerator.unwrap_model(model).{METHOD}(folder), or save dk.base_state_dict(model), and delta.save(folder)"
    )
