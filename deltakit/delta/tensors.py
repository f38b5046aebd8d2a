"""A delta's tensors by their names in files: `path.method.parameter`, or the plain name of a fully trained tensor."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import (
    TRAINING,
    Attachment,
    Site,
    gathered,
    is_sharded,
    join,
    normal_tensors,
    parameters_of,
    scatter,
    tensors_of,
)
from deltakit.delta.changed_backbone import is_part
from deltakit.delta.full_training import fully_trained_tensors
from deltakit.delta.running_statistics import fit, fitting
from deltakit.errors import OptionError, StateError
from deltakit.files import check_tensors, is_finite

FULLY_TRAINED = "fully_trained"
"""The tag of the backbone's own parameters that a delta fully trains."""


def named_parameters(attachment: Attachment) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields every trained parameter of a delta with its name."""
    labels = attachment.labels()
    for site in attachment.sites:
        prefix = join(site.path, f"{labels[site.method]}.")
        for name, parameter, _ in site.module.trained_parameters():
            yield prefix + name, parameter
    for name, tensor in fully_trained_tensors(attachment).items():
        if isinstance(tensor, nn.Parameter):
            yield name, tensor


def parameter_groups(attachment: Attachment, options: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a delta's trained parameters as an optimiser's groups: one for each tag with options, and one for the others.

    Raises:
        OptionError: if no parameter has one of the tags, or the options name the parameters themselves.
    """
    for tag, own in options.items():
        reserved = sorted(own.keys() & {"params", "tag"})
        if reserved:
            raise OptionError(
                f"parameter_groups({tag}=...): expected options of an optimiser, such as lr, found {reserved[0]!r}, which "
                "parameter_groups sets itself; leave it out"
            )
    groups: dict[str, list[nn.Parameter]] = {}
    tags: dict[str, None] = {}
    tagged = {id(p): tag for site in attachment.sites for _, p, tag in site.module.trained_parameters()}
    for _, parameter in named_parameters(attachment):
        tag = tagged.get(id(parameter), FULLY_TRAINED)
        tags[tag] = None
        groups.setdefault(tag if tag in options else "", []).append(parameter)
    unknown = sorted(options.keys() - tags.keys())
    if unknown:
        there = ", ".join(repr(tag) for tag in tags if tag) or "none"
        raise OptionError(
            f"parameter_groups({unknown[0]}=...): no parameter of delta {attachment.record.name!r} has this tag; its tags are "
            f"{there}"
        )
    return [{"params": found, **options.get(tag, {}), "tag": tag} for tag, found in groups.items()]


def state_dict(attachment: Attachment) -> dict[str, Tensor]:
    """Returns every tensor of a delta's file, gathered over processes.

    Raises:
        StateError: if this process has only a part of one (FSDP1, DeepSpeed ZeRO-3).
    """
    record = attachment.record
    state: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in (record.backbone_values or record.trained_values).items()}
    labels = attachment.labels()
    for site in attachment.sites:
        prefix = join(site.path, f"{labels[site.method]}.")
        state |= {prefix + name: value for name, value in site.module.saved_state().items()}
        parts |= {prefix + name: tensor for name, tensor in parameters_of(site.module).items()}
        first = site.module.first_sizes
        shapes |= {prefix + name: shape for name, shape in (first.parameters if first is not None else {}).items()}
    full = {name: tensor.detach() for name, tensor in trained_values(attachment).items()}
    state |= full
    _refuse_parts(parts | full, shapes)
    return {name: gathered(tensor) for name, tensor in state.items()}


def state_of(attachment: Attachment, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns every tensor of a delta's file from a state dict of the backbone that an engine has gathered.

    Nothing else is gathered: other processes may be elsewhere.

    Raises:
        StateError: if a tensor is not there, or is computed from what is not in one module.
    """
    state: dict[str, Tensor] = {}
    prefixes = [join(site.owner, f"{site.key}.") for site in attachment.sites]
    has_tensors = any(site.module.state_dict() for site in attachment.sites)
    if has_tensors and not any(name.startswith(tuple(prefixes)) for name in given):
        raise StateError(
            f"the state_dict that was given has no tensors of delta {attachment.record.name!r}, such as {prefixes[0]}*; omit "
            "state_dict=, which saves the model and the delta; or for a merged model call delta.merge_and_unload() first"
        )
    for site, prefix in zip(attachment.sites, prefixes, strict=True):
        own = {name: given[prefix + name] for name in site.module.state_dict() if prefix + name in given}
        state |= {attachment.named(site, name): value for name, value in _saved(site, own).items()}
    return state | {name: given.get(name, value.detach()) for name, value in trained_values(attachment).items()}


def _saved(site: Site, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if len(own) < len(site.module.state_dict()) or (site.module.computes_saved_state() and site.module._modules):
        raise StateError(
            f"{site.path}: expected all tensors of its {site.module.word()} in the state_dict that was given; call "
            "delta.save(folder) on every process instead, which gathers them"
        )
    if not site.module.computes_saved_state():
        return {name: value for name, value in own.items() if site.module.tag_of(name) != TRAINING}
    filled = copy.copy(site.module)
    filled.__dict__["_parameters"] = {name: nn.Parameter(value, requires_grad=False) for name, value in own.items()}
    return filled.saved_state()


def _refuse_parts(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, tensor in tensors.items():
        expected = shapes.get(name, tensor.shape)
        if tensor.shape != expected and is_part(tensor, expected):
            raise StateError(
                f"{name}: expected shape {tuple(expected)} as when it was attached, found {tuple(tensor.shape)}, because "
                "an engine keeps only a part of it in this process; gather it around this call by "
                "FullyShardedDataParallel.summon_full_params(model) or deepspeed.zero.GatheredParameters("
                "list(delta.parameters())), or shard with fully_shard (FSDP2), which deltakit gathers itself"
            )


def refuse_absent(state: Mapping[str, Tensor]) -> None:
    """Refuses to save a delta that was offloaded with its backbone.

    Raises:
        StateError: if a tensor has no values in memory.
    """
    for name, tensor in state.items():
        if tensor.is_meta:
            raise StateError(
                f"{name}: expected values to save, found a tensor on the meta device: the model was offloaded after "
                "attaching, so this delta can run, but not be trained or saved; offload first and attach afterwards"
            )


def refuse_not_finite(attachment: Attachment, state: Mapping[str, Tensor]) -> None:
    """Refuses to save a delta whose training has failed. What was saved before stays, and a load would refuse the new one.

    Raises:
        StateError: if a value is infinite or not a number. Only where the backbone's own tensor has such values, too, as in a
            mask of -inf, they are meant.
    """
    broken = [name for name, tensor in state.items() if not is_finite(tensor)]
    record = attachment.record
    own = dict(tensors_of(attachment.backbone)) | record.backbone_values if broken else {}
    for name in broken:
        if name not in record.fully_trained or is_finite(own[name]):
            raise StateError(
                f"delta {record.name!r}: {name} has values that are infinite or not a number, so its training has failed; "
                "load what was saved before, and train with a lower learning rate"
            )


def load_state_dict(
    attachment: Attachment,
    state: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    put: Callable[[Attachment, Mapping[str, Tensor]], None] | None = None,
) -> None:
    """Loads a state dict. Names and shapes must match exactly.

    Args:
        before: the tensors of the delta now, which are loaded again if this is interrupted.
        put: copies tensors of such a state dict into the delta; by default those of a file.
    """
    put = put or _put
    record = attachment.record
    values = {name: tensor.clone() for name, tensor in before.items()}
    held = dict(record.backbone_values), dict(record.trained_values), set(record.moved), record.start
    try:
        fit(attachment, state)
        _load(attachment, state, put)
        record.start = None
    except BaseException:
        record.backbone_values, record.trained_values, record.moved, record.start = held
        _load(attachment, values, put)
        raise


def fill(attachment: Attachment, state: Mapping[str, Tensor], where: str) -> None:
    """Loads the tensors of a file into a delta that was just built for them, and is thrown away if they do not fit.

    So nothing is copied to be loaded again, and nothing can be sharded yet.

    Args:
        where: the folder or repository, for error messages.

    Raises:
        CheckpointError: if a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    labels = attachment.labels()
    prefixes = [join(site.path, f"{labels[site.method]}.") for site in attachment.sites]
    own = [site.module.saved_state() for site in attachment.sites]
    expected = {prefix + name: value for prefix, of in zip(prefixes, own, strict=True) for name, value in of.items()}
    wanted = fitting(attachment, state, expected | attachment.record.trained_values)
    check_tensors(state, wanted, own=attachment.record.fully_trained, where=where)
    fit(attachment, state)
    with normal_tensors(), torch.no_grad():
        for site, prefix, of in zip(attachment.sites, prefixes, own, strict=True):
            if site.module.holds_saved_state():
                for name, value in of.items():
                    value.copy_(state[prefix + name])
            else:
                site.module.load_saved({name: state[prefix + name] for name in of})
        for name, tensor in trained_values(attachment).items():
            tensor.copy_(state[name])


def _load(attachment: Attachment, state: Mapping[str, Tensor], put: Callable[..., None]) -> None:
    with normal_tensors(), torch.no_grad():
        put(attachment, state)


def _put(attachment: Attachment, state: Mapping[str, Tensor]) -> None:
    for site in attachment.sites:
        own = site.module.saved_state()
        if any(map(is_sharded, own.values())):
            for name, tensor in own.items():
                scatter(tensor, state[attachment.named(site, name)])
        else:
            site.module.load_saved({name: state[attachment.named(site, name)] for name in own})
    for name, tensor in trained_values(attachment).items():
        scatter(tensor, state[name])


def trained_values(attachment: Attachment) -> dict[str, Tensor]:
    """Returns the trained values of the fully trained tensors: from the backbone if the delta is attached, else the record."""
    record = attachment.record
    values: Mapping[str, Tensor] = record.trained_values
    if attachment.attached and record.backbone_values:
        values = fully_trained_tensors(attachment)
    return {name: values[name] for name in record.fully_trained if name in values}
