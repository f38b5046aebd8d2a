"""Stands in the place of `save_pretrained` on a module that holds deltas.

transformers, diffusers and sentence-transformers save models by this method. It would write the tensors of deltas among
those of the model, and loading would drop them with no more than a line in the log.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

from torch import Tensor, nn

from deltakit.core import deltas_left_out, records_of
from deltakit.delta.checkpoint_hook import SavedBackbone
from deltakit.delta.own_values import own_values
from deltakit.delta.save_job import METHOD, SaveJob, leave_out_deltas, refuse_narrowed, refuse_peft
from deltakit.errors import OptionError, StateError
from deltakit.files import write_weights
from deltakit.injection import in_method_of, own_state_dicts


class Saver:
    """Saves a module and its deltas.

    In a folder of the Trainer's checkpoints it writes only what is trained. In any other it writes the backbone as it is
    without its deltas, and the deltas beside it.
    """

    def __init__(self, module: nn.Module, saved: SavedBackbone, before: Callable[..., Any] | None = None) -> None:
        # Weakly: the module holds this object, and must be freed without the garbage collector.
        self._module = ref(module)
        self._saved = saved
        self.before = before
        """An attribute of the module that had the name before."""
        saved.modules.add(module)

    def __reduce__(self) -> tuple[Any, ...]:
        # In a copy this is the copied module, which whoever copies has made already.
        return Saver, (self._module(), self._saved, self.before)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own `save_pretrained`. Pipelines of diffusers look at its signature."""
        module: Any = self._module()
        own: Callable[..., Any] = self.before or getattr(type(module), METHOD).__get__(module)
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the module and its deltas, with the arguments of its own `save_pretrained`.

        Raises:
            CheckpointError: if the files of a delta cannot be written, or another delta is in the folder.
            OptionError: if no folder is given.
            StateError: as `Delta.save` does, for `push_to_hub=True`, and for a part of the model that the deltas are attached
                to.
        """
        own, module = self.__wrapped__, self._module()
        assert module is not None
        root = self._saved.root_of(module)
        if deltas_left_out():
            # A holder of the module saves itself, and then the deltas.
            with own_state_dicts(module, own_values(module, root, merged=False)):
                return own(*args, **kwargs)
        options = _by_name(own, args, kwargs)
        folder = options.get(next(iter(inspect.signature(own).parameters), ""))
        if folder is None:
            raise OptionError(f"{METHOD}: no folder was given; pass it as the first argument")
        refuse_upload(options)
        job = SaveJob(root, Path(folder), options.get("state_dict"), options.get("is_main_process", True))
        if module is root and job.makes_checkpoint:
            return job.save_checkpoint(partial(write_weights, job.folder), partial(_with_state, own, options))
        # A method of the whole may save itself by its parts, as `SentenceTransformer.save` does.
        if module is not root and job.deltas and not in_method_of(root):
            refuse_part(module)
        states = job.states()
        refuse_peft(module, job)
        refuse_narrowed(module, job)
        if job.state is not None:
            options["state_dict"] = dict(job.state)
            leave_out_deltas(module, root, options["state_dict"])
        with own_state_dicts(module, own_values(module, root, merged=False)):
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


def _with_state(own: Callable[..., Any], options: Mapping[str, Any], state: Mapping[str, Tensor] | None) -> Any:
    return own(**(options if state is None else {**options, "state_dict": state}))


def refuse_upload(options: Mapping[str, Any]) -> None:
    """Refuses to upload a model before its deltas are written.

    Raises:
        StateError: if these options of `save_pretrained` say so.
    """
    if options.get("push_to_hub"):
        raise StateError(
            f"{METHOD}(push_to_hub=True) would upload the model without its deltas; call model.push_to_hub(repository), "
            "which uploads both"
        )


def refuse_part(module: nn.Module) -> None:
    """Refuses to save a part of the model that deltas are attached to: their paths are those of the whole model.

    Raises:
        StateError: always.
    """
    names = ", ".join(repr(record.name) for record in records_of(module))
    raise StateError(
        f"{METHOD}: this {type(module).__name__} is a part of the model that delta {names} is attached to, and the delta "
        f"would not load into the part; call {METHOD} of the whole model, or save the part without the delta: "
        f"delta.save(folder), delta.detach(), {METHOD} with another folder, and delta.attach()"
    )
