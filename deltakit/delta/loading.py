"""`load` adds a saved delta to a backbone."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any, Literal

from torch import Tensor, nn

from deltakit.core import Attachment, Site, checked, collections_paused, one_walk, tensors_of
from deltakit.delta.attaching import new_record, sites_of
from deltakit.delta.full_training import current_values
from deltakit.delta.handle import Delta
from deltakit.delta.planning import original
from deltakit.delta.rebuilding import check_paths, has_its_tensors, placed, rebuilt
from deltakit.delta.tensors import fill
from deltakit.errors import BackboneMismatch, CheckpointError, warn
from deltakit.files import (
    Access,
    Saved,
    backbone_identity,
    called,
    differences,
    expanded,
    find_folder,
    from_file,
    methods_of,
    read_saved,
    room_for,
)
from deltakit.selection import BackboneIndex

OTHER_BACKBONE = "this is not the backbone the delta was trained on"
"""What the error or warning about another backbone says."""


@checked
def load(
    source: str | PathLike[str],
    backbone: nn.Module,
    *,
    name: str | None = None,
    freeze: bool = True,
    attach: bool = True,
    check: Literal["error", "warn"] = "error",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Delta:
    """Loads a delta from a folder or a Hub repository, attaches it to the backbone, and returns it.

    It reads deltas of deltakit, of PEFT, of AdapterHub and of OpenDelta, and LoRAs of image models (diffusers, kohya's
    sd-scripts, LyCORIS). Of a file for several components of a pipeline it loads the one that fits.

    Args:
        source: the folder, the repository as "owner/name", or a LoRA of kohya or LyCORIS as a file.
        name: the delta's name; by default the one that it was saved with. One of the two is required to put a method on a
            target that has the same method from another delta.
        freeze: whether to freeze the backbone's own parameters. They stay frozen as long as such a delta is attached; after
            the last one they require gradients as before. With False the delta leaves them as they are, and `print(delta)`
            says how many of them are trained without being saved.
        attach: whether to attach it now. A delta that is loaded but not attached costs nothing in forwards; its `attach()`
            attaches it later.
        check: "error" or "warn" if the backbone is not the one that the delta was trained on. Files of others do not say.
        revision: a branch, tag or commit of the repository.
        token: the Hub's access token; by default the one of `hf auth login`.
        cache_dir: where downloads are kept; by default the Hub's own cache.
        local_files_only: whether to read the cache alone, without asking the Hub.
        subfolder: where in the repository or folder the delta is, if not at its top: a folder such as "style", or a LoRA of
            kohya or LyCORIS as a file, such as "style.safetensors".

    Raises:
        CheckpointError: if there is no delta, it is damaged, its methods cannot be built on this backbone, or its tensors do
            not fit. Nothing is changed then.
        BackboneMismatch: if the backbone differs from the one that the delta was trained on.
        HubError: if the repository cannot be read.
        OptionError: if `check`, `name` or `subfolder` has a wrong value.
        StateError: if the name is taken, the delta has no name and a target has the same method already, the backbone is
            wrapped for distribution or is in a `rows` block, or another delta fully trains the same parameters or is merged
            into them.
    """
    access = Access(revision, token, cache_dir, local_files_only, subfolder)
    folder, where = find_folder(source, access), called(source, access)
    backbone = original(backbone)
    with one_walk(backbone), collections_paused():
        saved = read_saved(folder, backbone, where)
        delta, tensors = unfilled(saved, backbone, where, name=name, freeze=freeze, check=check)
        fill(delta._attachment, tensors, where)
        return delta.attach() if attach else delta


def unfilled(
    saved: Saved,
    backbone: nn.Module,
    where: str,
    *,
    name: str | None = None,
    freeze: bool = True,
    check: str = "error",
    advice: str = "load that backbone, or pass check='warn' to load the delta all the same",
) -> tuple[Delta, Mapping[str, Tensor]]:
    """Returns a delta with the methods and targets of a saved one, not attached and without its values; and these values.

    Args:
        backbone: the user's own model (`original`).
        where: the folder or repository, for error messages.
        advice: what to do if the backbone is another one.

    Raises:
        DeltaError: as `load` does.
    """
    index = BackboneIndex(backbone)
    saved = placed(index, saved, where)
    own = dict(tensors_of(backbone))
    if saved.fingerprint is not None:
        _check_backbone(saved.fingerprint, backbone, where, check, advice)
    limit = room_for([*index.by_path, *own])
    found = methods_of(saved.methods, index, limit, where)
    with from_file(where, "train.names"):
        full = expanded(saved.train.names, own, limit)
    check_paths(own, full, where)
    with nullcontext() if name is not None else from_file(where, "name"):
        name = name if name is not None else saved.name
        record = new_record([m for m, _ in found], name, freeze, saved.train.selectors)
    built = []
    for number, (method, paths) in enumerate(found):
        built.append(rebuilt(index, method, paths, saved.tensors, where))
        if number + 1 < len(found) and not has_its_tensors(record, number, built[-1], saved.tensors):
            # `load_state_dict` lists what is missing.
            break
    record.trained_values = current_values(backbone, full, record)
    record.extras.update(saved.extras)
    sites = sites_of(index, built)
    if saved.fingerprint is None:
        _refuse_unseen(sites, where)
    return Delta(Attachment(backbone, record, sites)), saved.tensors


def _refuse_unseen(sites: Sequence[Site], where: str) -> None:
    """Refuses an adapter of others at a module that is never called: there it did nothing, and a weight patch would.

    Raises:
        CheckpointError: if there is one.
    """
    for site in sites:
        if site.module.target_never_called:
            raise CheckpointError(
                f"{where}: the module around {site.path} reads its weight directly, so the adapter has no effect there in the "
                "library that saved it; attach a new delta"
            )


def _check_backbone(fingerprint: Mapping[str, Any], backbone: nn.Module, where: str, check: str, advice: str) -> None:
    found = backbone_identity(backbone)["fingerprint"]
    with from_file(where, "backbone.fingerprint"):
        other = differences(fingerprint, found)
    if not other:
        return
    message = f"{where}: {OTHER_BACKBONE}: {other[0]}"
    if check == "error":
        raise BackboneMismatch(f"{message}; {advice}")
    warn(message)
