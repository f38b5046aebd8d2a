"""Makes `save_pretrained` of a backbone save its deltas, too.

transformers, diffusers and sentence-transformers save models by this method. It would write the tensors of deltas among
those of the model, and loading would drop them with no more than a line in the log.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

from torch import Tensor, nn

from deltakit.core import DeltaModule, deltas_left_out, is_sharded, own_modules, records_at, records_of, tensors_of
from deltakit.delta.checkpoint_hook import LoadCheckpoint, Savers
from deltakit.delta.contents import DeltaContents
from deltakit.delta.earlier_saves import refuse_earlier
from deltakit.delta.own_values import kept_values
from deltakit.delta.saving import state_to_save, write
from deltakit.delta.training_state import checkpoint_tensors, rooted_deltas, trains_only_deltas
from deltakit.errors import OptionError, StateError
from deltakit.files import write_weights
from deltakit.injection import bare_state_dicts, hook_loading, is_narrowed, whole_state_dict

_METHOD = "save_pretrained"
# The Trainer's name for the folders of its checkpoints (`PREFIX_CHECKPOINT_DIR`).
CHECKPOINT = re.compile(r"checkpoint-\d+")


class Saver:
    """Stands in the place of `save_pretrained` on a module that holds deltas.

    In a folder of the Trainer's checkpoints it writes only what is trained. In any other it writes the backbone as it is
    without its deltas, and the deltas beside it.
    """

    def __init__(self, module: nn.Module, savers: Savers, before: Callable[..., Any] | None = None) -> None:
        # Weakly: the module holds this object, and must be freed without the garbage collector.
        self._module = ref(module)
        self._savers = savers
        self.before = before
        """An attribute of the module that had the name before."""
        savers.modules.add(module)

    def __reduce__(self) -> tuple[Any, ...]:
        # In a copy this is the copied module, which whoever copies has made already.
        return Saver, (self._module(), self._savers, self.before)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own `save_pretrained`. Pipelines of diffusers look at its signature."""
        module: Any = self._module()
        own: Callable[..., Any] = self.before or getattr(type(module), _METHOD).__get__(module)
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the module and its deltas, with the arguments of its own `save_pretrained`.

        Raises:
            CheckpointError: if the files of a delta cannot be written, or another delta is in the folder.
            OptionError: if no folder is given.
            StateError: as `Delta.save` does, and for `push_to_hub=True`.
        """
        own, module = self.__wrapped__, self._module()
        assert module is not None
        root = self._savers.root_of(module)
        if deltas_left_out():
            # A holder of the module saves itself, and then the deltas.
            with bare_state_dicts(module, _bare_values(module, root)):
                return own(*args, **kwargs)
        options = _by_name(own, args, kwargs)
        folder = options.get(next(iter(inspect.signature(own).parameters), ""))
        if folder is None:
            raise OptionError(f"{_METHOD}: no folder was given; pass it as the first argument")
        if options.get("push_to_hub"):
            raise StateError(
                f"{_METHOD}(push_to_hub=True) would upload the model without its deltas; call model.push_to_hub(repository), "
                "which uploads both"
            )
        job = Job(root, Path(folder), options.get("state_dict"), options.get("is_main_process", True))
        if module is root and CHECKPOINT.fullmatch(job.folder.name):
            return job.save_checkpoint(partial(own, **options))
        states = job.states()
        _refuse_peft(module, job)
        _refuse_narrowed(module, job)
        if job.state is not None:
            options["state_dict"] = _without_deltas(module, root, job.state)
        with bare_state_dicts(module, _bare_values(module, root)):
            result = own(**options)
        job.write(states)
        return result


def _by_name(own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(own).bind(*args, **kwargs)
    extra = [name for name, p in bound.signature.parameters.items() if p.kind is p.VAR_KEYWORD]
    found = dict(bound.arguments)
    for name in extra:
        found |= found.pop(name, {})
    return found


class Job:
    """One call: where a backbone is saved, and what an engine says of it.

    Args:
        state: the state dict that an engine has gathered; None if every process takes part.
        is_main: whether this process writes.
    """

    def __init__(self, root: nn.Module, folder: Path, state: Mapping[str, Tensor] | None, is_main: bool) -> None:
        self.root, self.folder, self.state, self.is_main = root, folder, state, is_main
        # A merged one is in the weights.
        self.deltas = [DeltaContents(found) for found in rooted_deltas(root) if not found.record.merged]
        self.sharded = any(is_sharded(p) for delta in self.deltas for p in delta.parameters())

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
            refuse_earlier(self.folder, [delta.name for delta in self.deltas])
        return [state_to_save(delta, self.state) for delta in self.deltas]

    def write(self, states: list[dict[str, Tensor]]) -> None:
        """Writes the deltas' files into the folder, or each into a folder in it if there are several."""
        for delta, state in zip(self.deltas, states, strict=False):
            folder = self.folder / delta.name if len(self.deltas) > 1 else self.folder
            if self.is_main:
                write(delta, folder, "deltakit", state)

    def save_checkpoint(self, whole: Callable[[], Any]) -> Any:
        """Writes what a framework needs to resume, and the deltas as `load` reads them.

        Args:
            whole: saves the model with its deltas. It is called if more is trained than the deltas.

        Raises:
            StateError: if a delta is merged.
        """
        whole_model, states = not trains_only_deltas(self.root), self.states()
        if whole_model:
            _refuse_peft(self.root, self)
            _refuse_narrowed(self.root, self)
            with whole_state_dict():
                result = whole()
            self.write(states)
            return result
        if self.takes_part:
            tensors = checkpoint_tensors(self.root, self.state)
            if self.is_main:
                write_weights(self.folder, tensors)
                self.write(states)
        return None


def _refuse_peft(module: nn.Module, job: Job) -> None:
    """Refuses a module with adapters of PEFT, whose `save_pretrained` writes these alone.

    Raises:
        StateError: if there are some, and deltas to save beside them.
    """
    # The first is what `add_adapter` of transformers sets, the second what a `PeftModel` has.
    with_peft = any(getattr(child, "_hf_peft_config_loaded", False) for child in module.modules())
    if job.deltas and (with_peft or getattr(module, "peft_config", None)):
        raise StateError(
            f"{_METHOD}: an adapter of PEFT is on this {type(module).__name__} beside deltas, and only that adapter would be "
            f"written, not the model; save each alone: delta.save(folder) for each delta, then delta.detach(), {_METHOD} "
            "with another folder, and delta.attach()"
        )


def _refuse_narrowed(module: nn.Module, job: Job) -> None:
    """Refuses a state dict without the module's weights, as a module gives that OpenDelta's `freeze_module` has narrowed.

    Raises:
        StateError: if it lacks any.
    """
    if job.state is None or not job.is_main or not is_narrowed(module):
        return
    with bare_state_dicts(module, {}):
        absent = module.state_dict().keys() - job.state.keys()
    if absent:
        raise StateError(
            f"{_METHOD}: state_dict= lacks {len(absent)} of the model's tensors, such as {min(absent)}, because "
            "freeze_module(set_state_dict=True) has narrowed model.state_dict(); omit state_dict=, or pass "
            "set_state_dict=False where you call freeze_module"
        )


def _bare_values(module: nn.Module, root: nn.Module) -> dict[str, Tensor]:
    """Returns the backbone's own values of what deltas that are not merged have changed in a module, by the names there."""
    own = {id(tensor): value for tensor, value in kept_values(root, merged=False)}
    return {name: own[id(tensor)].detach() for name, tensor in tensors_of(module) if id(tensor) in own}


def _without_deltas(module: nn.Module, root: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict that an engine has gathered, without the tensors of deltas and with the backbone's own values."""
    ours = {
        key
        for path, child in module.named_modules()
        if isinstance(child, DeltaModule)
        for key in child.state_dict(prefix=f"{path}.")
    }
    # What is sharded cannot be gathered here: the other processes may be elsewhere.
    bare = {name: value for name, value in _bare_values(module, root).items() if not is_sharded(value)}
    return {key: bare.get(key, value) for key, value in state.items() if key not in ours}


def follow_saving(backbone: nn.Module) -> None:
    """Gives a backbone with deltas what saves and loads it with them, and removes that from one without deltas."""
    holds = any(not record.leaving for record in records_of(backbone))
    there = hook_loading(backbone, LoadCheckpoint, partial(LoadCheckpoint, backbone, Savers()))
    savers: Savers = there.savers
    wanted = [module for _, module in own_modules(backbone) if holds and _saves(module) and _has_deltas(module)]
    for module in wanted:
        before = module.__dict__.get(_METHOD)
        if not isinstance(before, Saver):
            module.__dict__[_METHOD] = Saver(module, savers, before)
    # Also those that the user has taken out of the backbone since.
    for module in set(savers.modules) - set(wanted):
        saver = module.__dict__.get(_METHOD)
        if isinstance(saver, Saver):
            if saver.before is None:
                del module.__dict__[_METHOD]
            else:
                module.__dict__[_METHOD] = saver.before
        savers.modules.discard(module)
    if not holds:
        hook_loading(backbone, LoadCheckpoint, None)


def _saves(module: nn.Module) -> bool:
    return callable(getattr(type(module), _METHOD, None)) or callable(module.__dict__.get(_METHOD))


def _has_deltas(module: nn.Module) -> bool:
    return any(not record.leaving for _, child in own_modules(module) if child._modules for record in records_at(child))
