"""Checkpoints of a transformers `Trainer` that hold only what deltas train.

Trainers of transformers' models need nothing of this. `Trainer` reads and writes other models by functions of its own, and
sentence-transformers loads a whole model; these are replaced on the one object that is given.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from deltakit.core import checked
from deltakit.delta import SaveJob, deltas_in_file, whole_checkpoint_mark
from deltakit.errors import OptionError
from deltakit.files import DELTA_FILES, WEIGHTS_FILE, read_tensors
from deltakit.integrations.inner_backbones import inner_backbones, shrink

_METHODS = ("_save", "_load_from_checkpoint", "_load_best_model", "_push_from_checkpoint")


T = TypeVar("T")


@checked
def small_checkpoints(trainer: T) -> T:
    """Makes checkpoints of a `Trainer` hold only what deltas train, for models of any class, and returns the trainer.

    Trainers of plain modules, of modules around backbones with deltas (such as `PromptModel`) and of sentence-transformers
    need this line. Of a module around backbones the rest is in the checkpoint, too, such as a verbalizer. Others need it only
    for two things: resuming without `attach` then raises an error that names the missing delta, and what `push_to_hub=True`
    uploads during training has the deltas' files.

    Raises:
        OptionError: if this is no `Trainer`.
    """
    kind = type(trainer)
    absent = [name for name in _METHODS if not callable(getattr(kind, name, None))]
    if absent:
        raise OptionError(
            f"small_checkpoints: expected a transformers.Trainer, found a {kind.__name__}, which has no {absent[0]}; pass the "
            "trainer before calling train()"
        )
    methods: tuple[Callable[..., Any], ...] = (_save, _load_from_checkpoint, _load_best_model, _push)
    for name, method in zip(_METHODS, methods, strict=True):
        setattr(trainer, name, MethodType(method, trainer))
    return trainer


def _save(trainer: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
    folder, model = Path(output_dir if output_dir is not None else trainer.args.output_dir), trainer.model
    own = partial(type(trainer)._save, trainer, output_dir)
    # What has the method of its own saves its deltas by itself.
    plain = isinstance(model, nn.Module) and not hasattr(model, "save_pretrained")
    job = SaveJob(model, folder, state_dict, trainer.args.should_save) if plain else None
    if job is None or not job.makes_checkpoint:
        if job is None or not _save_around(job, own):
            own(state_dict=state_dict)
        return

    def whole(state: Any) -> None:
        own(state_dict=state if state is not None else model.state_dict() | whole_checkpoint_mark(model))

    job.save_checkpoint(lambda small: own(state_dict=small), whole)


def _save_around(whole: SaveJob, own: Callable[..., None]) -> bool:
    """Saves a checkpoint of a module around backbones with deltas. Returns whether it is one."""
    inner = inner_backbones(whole.root)
    if not inner or not whole.in_checkpoint:
        return False
    jobs = []
    for backbone, (path, *_) in inner.items():
        own_keys = [key for key in whole.state or () if key.startswith(f"{path}.")]
        given = None if whole.state is None else {key[len(path) + 1 :]: whole.state[key] for key in own_keys}
        # One delta stands in the folder itself, as `load` expects it.
        jobs.append(SaveJob(backbone, whole.folder, given, whole.is_main, path if len(inner) > 1 else ""))
    # All checks come before anything is written.
    states = [job.states() for job in jobs]
    found = dict(whole.root.state_dict() if whole.state is None else whole.state)
    shrink(whole.root, found)
    own(state_dict=found)
    for job, tensors in zip(jobs, states, strict=True):
        job.write(tensors)
    return True


def _load_from_checkpoint(trainer: Any, resume_from_checkpoint: str, model: Any = None) -> None:
    chosen = trainer.model if model is None else model
    if not _load(Path(resume_from_checkpoint), chosen):
        type(trainer)._load_from_checkpoint(trainer, resume_from_checkpoint, *(() if model is None else (model,)))


def _load_best_model(trainer: Any) -> None:
    if not _load(Path(trainer.state.best_model_checkpoint), trainer.model):
        type(trainer)._load_best_model(trainer)


def _push(trainer: Any, checkpoint_folder: str) -> None:
    # The Trainer copies files by a list of its own into the folder that it uploads.
    if trainer.is_world_process_zero():
        for folder in {file.parent for file in Path(checkpoint_folder).glob(f"**/{DELTA_FILES[0]}")}:
            place = Path(trainer.args.output_dir) / folder.relative_to(checkpoint_folder)
            place.mkdir(parents=True, exist_ok=True)
            for name in DELTA_FILES:
                shutil.copy(folder / name, place / name)
    type(trainer)._push_from_checkpoint(trainer, checkpoint_folder)


def _load(folder: Path, model: nn.Module) -> bool:
    """Loads a checkpoint that holds only deltas. Returns whether it is one."""
    file = folder / WEIGHTS_FILE
    if not deltas_in_file(model, file, str(folder)):
        return False
    model.load_state_dict(read_tensors(file))
    return True
