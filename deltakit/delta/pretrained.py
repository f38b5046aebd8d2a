"""Puts on a backbone with deltas what saves and loads it with them, and takes it away again."""

from functools import partial

from torch import nn

from deltakit.core import own_modules, records_at, records_of
from deltakit.delta.checkpoint_hook import LoadCheckpoint, SavedBackbone
from deltakit.delta.other_saves import OtherSaves
from deltakit.delta.save_job import METHOD
from deltakit.delta.saver import Saver
from deltakit.injection import hook_loading, hook_state_dicts


def follow_saving(backbone: nn.Module) -> None:
    """Gives a backbone with deltas what saves and loads it with them, and removes that from one without deltas."""
    holds = any(not record.leaving for record in records_of(backbone))
    there = hook_loading(backbone, LoadCheckpoint, partial(LoadCheckpoint, backbone, SavedBackbone()))
    saved: SavedBackbone = there.saved
    # By class, because most modules have one of a few, which cannot be saved.
    modules = [module for _, module in own_modules(backbone)] if holds else []
    savable = {kind for kind in set(map(type, modules)) if callable(getattr(kind, METHOD, None))}
    wanted = [
        module
        for module in modules
        if (type(module) in savable or callable(module.__dict__.get(METHOD))) and _has_deltas(module)
    ]
    for module in wanted:
        before = module.__dict__.get(METHOD)
        if not isinstance(before, Saver):
            module.__dict__[METHOD] = Saver(module, saved, before)
        hook_state_dicts(module, OtherSaves, wanted=True)
    # Also those that the user has taken out of the backbone since.
    for module in set(saved.modules) - set(wanted):
        saver = module.__dict__.get(METHOD)
        if isinstance(saver, Saver):
            if saver.before is None:
                del module.__dict__[METHOD]
            else:
                module.__dict__[METHOD] = saver.before
        hook_state_dicts(module, OtherSaves, wanted=False)
        saved.modules.discard(module)
    hook_state_dicts(backbone, OtherSaves, wanted=holds)
    if not holds:
        hook_loading(backbone, LoadCheckpoint, None)


def _has_deltas(module: nn.Module) -> bool:
    return any(not record.leaving for _, child in own_modules(module) if child._modules for record in records_at(child))
