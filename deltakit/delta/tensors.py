"""The values of a delta by the names of its file: `path.method.parameter`, and plain names for what it trains whole."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from deltakit.core import Record, Site, fill, is_sharded, join, label_of, parameters_of, tensors_of, whole
from deltakit.errors import StateError


def named_parameters(backbone: nn.Module, record: Record, sites: Sequence[Site]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that a delta trains."""
    for site in sites:
        for name, parameter in site.module.named_parameters():
            yield _key(record, site, name), parameter
    own = dict(tensors_of(backbone)) if record.whole else {}
    for name in record.whole:
        tensor = own[name]
        if isinstance(tensor, nn.Parameter):
            yield name, tensor


def state_dict(backbone: nn.Module, record: Record, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Every tensor that a delta's file holds."""
    state: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in record.whole.items()}
    for site in sites:
        state |= {_key(record, site, name): value for name, value in site.module.saved_state().items()}
        parts |= {_key(record, site, name): tensor for name, tensor in parameters_of(site.module).items()}
        shapes |= {_key(record, site, name): shape for name, shape in (site.module.shapes or {}).items()}
    trained_whole = {name: tensor.detach() for name, tensor in _whole(backbone, record, sites).items()}
    state |= trained_whole
    _refuse_parts(parts | trained_whole, shapes)
    return {name: whole(tensor) for name, tensor in state.items()}


def _refuse_parts(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise StateError(
                f"{name}: expected shape {tuple(shapes[name])} as it was attached, found {tuple(tensor.shape)}: an engine "
                "left a part of it in this process; put it together around this call, as by "
                "FullyShardedDataParallel.summon_full_params(model) or deepspeed.zero.GatheredParameters("
                "list(delta.parameters())), or shard with fully_shard (FSDP2), which deltakit puts together itself"
            )


def refuse_absent(state: Mapping[str, Tensor]) -> None:
    """Raises `StateError` if a tensor has no values in memory."""
    for name, tensor in state.items():
        if tensor.is_meta:
            raise StateError(
                f"{name}: expected values to save, found a tensor on the meta device: the model was offloaded after "
                "attaching, so that this delta can run and not be trained or saved; offload first and attach afterwards"
            )


@torch.no_grad()
def load_state_dict(backbone: nn.Module, record: Record, sites: Sequence[Site], state: Mapping[str, Tensor]) -> None:
    """Takes over a state dict of exactly the delta's names and shapes."""
    for site in sites:
        own = site.module.saved_state()
        if any(map(is_sharded, own.values())):
            for name, tensor in own.items():
                fill(tensor, state[_key(record, site, name)])
        else:
            site.module.load_saved({name: state[_key(record, site, name)] for name in own})
    for name, tensor in _whole(backbone, record, sites).items():
        fill(tensor, state[name])


def _whole(backbone: nn.Module, record: Record, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The trained values of what is trained whole: in the backbone while the delta is attached, else in its record."""
    if not record.whole or sites[0].key is None:
        return record.whole
    own = dict(tensors_of(backbone))
    return {name: own[name] for name in record.whole}


def _key(record: Record, site: Site, name: str) -> str:
    return join(site.path, f"{label_of(record, site.method)}.{name}")
