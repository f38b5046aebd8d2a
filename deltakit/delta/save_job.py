"""One save of a backbone with deltas: the deltas' files beside it, and its own state dict without them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltakit.core import DeltaModule, is_sharded
from deltakit.delta.contents import DeltaContents
from deltakit.delta.earlier_saves import refuse_earlier
from deltakit.delta.own_values import own_values
from deltakit.delta.saving import state_to_save, write
from deltakit.delta.training_state import checkpoint_tensors, rooted_deltas, trains_only_deltas
from deltakit.delta.whole_checkpoints import whole_checkpoint_mark
from deltakit.errors import StateError
from deltakit.injection import is_checkpoint, is_narrowed, own_state_dicts, whole_state_dict

METHOD = "save_pretrained"


class SaveJob:
    """One call: where a backbone is saved, and what an engine says of it.

    Args:
        state: the state dict that an engine has gathered; None if every process takes part.
        is_main: whether this process writes.
        part: the path of the backbone in the saved model. Its deltas go into a folder of that name.
    """

    def __init__(
        self, root: nn.Module, folder: Path, state: Mapping[str, Tensor] | None, is_main: bool, part: str = ""
    ) -> None:
        self.root, self.folder, self.state, self.is_main, self.part = root, folder, state, is_main, part
        # A merged one is in the weights.
        self.deltas = [DeltaContents(found) for found in rooted_deltas(root) if not found.record.merged]
        self.sharded = any(is_sharded(p) for delta in self.deltas for p in delta.parameters())

    @property
    def in_checkpoint(self) -> bool:
        """Whether the folder is a checkpoint of the Trainer."""
        return is_checkpoint(self.folder)

    @property
    def makes_checkpoint(self) -> bool:
        """Whether it is, and the backbone has deltas."""
        return self.in_checkpoint and bool(rooted_deltas(self.root))

    @property
    def takes_part(self) -> bool:
        """Whether this process has something to do: to write, or to help others to gather what is sharded."""
        return self.is_main or (self.sharded and self.state is None)

    def states(self) -> list[dict[str, Tensor]]:
        """Returns the tensors of the deltas' files. All checks come before anything is written.

        Raises:
            CheckpointError: if another delta is in the folder.
            StateError: as `Delta.save` does.
        """
        if not self.takes_part:
            return []
        if self.is_main:
            refuse_earlier(self.folder, [delta.name for delta in self.deltas], self.part)
        return [state_to_save(delta, self.state) for delta in self.deltas]

    def write(self, states: list[dict[str, Tensor]]) -> None:
        """Writes the deltas' files into the folder, or each into a folder in it if there are several."""
        for delta, state in zip(self.deltas, states, strict=False):
            if self.is_main:
                write(delta, self.folder / self.part / (delta.name if len(self.deltas) > 1 else ""), "deltakit", state)

    def save_checkpoint(
        self, small: Callable[[Mapping[str, Tensor]], Any], whole: Callable[[Mapping[str, Tensor] | None], Any]
    ) -> Any:
        """Writes what a framework needs to resume, and the deltas as `load` reads them.

        Args:
            small: writes these tensors, in the process that writes.
            whole: saves the model with its deltas, and with this state dict if an engine has gathered one. It is called if
                more is trained than the deltas.

        Raises:
            StateError: if a delta is merged.
        """
        whole_model, states, result = not trains_only_deltas(self.root), self.states(), None
        if whole_model:
            refuse_peft(self.root, self)
            refuse_narrowed(self.root, self)
            mark = {} if self.state is None else whole_checkpoint_mark(self.root)
            with whole_state_dict():
                result = whole(None if self.state is None else {**self.state, **mark})
        elif self.takes_part:
            tensors = checkpoint_tensors(self.root, self.state)
            if self.is_main:
                small(tensors)
        self.write(states)
        return result


def refuse_peft(module: nn.Module, job: SaveJob) -> None:
    """Refuses a module with adapters of PEFT, whose `save_pretrained` writes these alone.

    Raises:
        StateError: if there are some, and deltas to save beside them.
    """
    # The first is what `add_adapter` of transformers sets, the second what a `PeftModel` has.
    with_peft = any(getattr(child, "_hf_peft_config_loaded", False) for child in module.modules())
    if job.deltas and (with_peft or getattr(module, "peft_config", None)):
        raise StateError(
            f"{METHOD}: an adapter of PEFT is on this {type(module).__name__} beside deltas, and only that adapter would be "
            f"written, not the model; save each alone: delta.save(folder) for each delta, then delta.detach(), {METHOD} "
            "with another folder, and delta.attach()"
        )


def refuse_narrowed(module: nn.Module, job: SaveJob) -> None:
    """Refuses a state dict without the module's weights, as a module gives that OpenDelta's `freeze_module` has narrowed.

    Raises:
        StateError: if it lacks any.
    """
    if job.state is None or not job.is_main or not is_narrowed(module):
        return
    with own_state_dicts(module, {}):
        absent = module.state_dict().keys() - job.state.keys()
    if absent:
        raise StateError(
            f"{METHOD}: state_dict= lacks {len(absent)} of the model's tensors, such as {min(absent)}, because "
            "freeze_module(set_state_dict=True) has narrowed model.state_dict(); omit state_dict=, or pass "
            "set_state_dict=False where you call freeze_module"
        )


def leave_out_deltas(module: nn.Module, root: nn.Module, state: dict[str, Any], prefix: str = "") -> None:
    """Takes the tensors of deltas out of a state dict, and puts the backbone's own values into it.

    Args:
        module: the module whose state dict it is, or is a part of.
        root: the backbone of the deltas.
        prefix: of the module in the state dict.
    """
    for path, child in module.named_modules():
        if isinstance(child, DeltaModule):
            for key in child.state_dict(prefix=f"{prefix}{path}."):
                state.pop(key, None)
    for name, value in own_values(module, root, merged=False).items():
        key = prefix + name
        # Where an engine has gathered the state dict, what is sharded stays out: the other processes may be elsewhere.
        if key in state and is_sharded(value) <= is_sharded(state[key]):
            state[key] = value
