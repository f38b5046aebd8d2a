"""How much a delta has changed each weight: the norm of its update, beside that of the weight."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import (
    Attachment,
    Site,
    Target,
    WeightView,
    bare_weight,
    gathered,
    is_quantized,
    join,
    name_of,
    parent_of,
    weight_view,
    wide,
)
from deltakit.delta.full_training import fully_trained_tensors, tensors_at
from deltakit.errors import StateError, TargetError
from deltakit.selection import BackboneIndex
from deltakit.view import Printed, Table, short


@dataclass(frozen=True)
class UpdateSize:
    """The Frobenius norms of the update at one target and of the backbone's own weight there; None if they are not known.

    `method` is the name of the method, or "fully trained". `why` says why a norm is not known.
    """

    path: str
    method: str
    update: float | None = None
    weight: float | None = None
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """The norm of the update over that of the weight; None if one of them is not known, or the weight is zero."""
        return self.update / self.weight if self.update is not None and self.weight else None


@dataclass(frozen=True, repr=False)
class UpdateSizes(Printed):
    """The sizes of a delta's updates, in the order of the backbone, or the largest first."""

    name: str
    sizes: tuple[UpdateSize, ...]
    omitted: int = 0
    """The number of targets with smaller updates that are not listed."""
    width: int | None = None
    """The most cells of a line in text; None for as many as it needs."""

    def _parts(self) -> Iterator[str | Table]:
        known = [size.ratio for size in self.sizes if size.ratio is not None and math.isfinite(size.ratio)]
        largest = max(known, default=0.0)
        yield f"delta {self.name!r}: norm of the update / norm of the weight"
        rows = [(_figure(s), _norm(s.update), _norm(s.weight), s.method, s.path or "^") for s in self.sizes]
        # A training that failed leaves values that are not finite.
        bars = [
            None if s.ratio is None or not math.isfinite(s.ratio) else s.ratio / (largest or 1.0) for s in self.sizes
        ]
        heads = ("ratio", "update", "weight", "method", "target")
        yield Table(heads, rows, right=(0, 1, 2), selectors=4, bars=bars)
        if self.omitted:
            yield f"  and {self.omitted} more"
        for why in dict.fromkeys(size.why for size in self.sizes if size.why):
            yield f"  - : {why}"

    def to_dict(self) -> dict[str, Any]:
        """Returns its contents as data that `json.dumps` takes."""
        return {"delta": self.name, "targets": [{**asdict(size), "ratio": size.ratio} for size in self.sizes]}


@torch.no_grad()
def update_sizes(attachment: Attachment, top: int | None, width: int | None = None) -> UpdateSizes:
    """Returns the sizes of the updates of a delta.

    Args:
        top: how many to return, the largest first; None for all of them, in the order of the backbone.
        width: the most cells of a line in text.
    """
    index = BackboneIndex(attachment.backbone)
    found = [_of_site(attachment, index, site) for site in attachment.sites]
    found += list(_fully_trained(attachment))
    if top is None:
        order = {path: place for place, path in enumerate(index.by_path)}
        found.sort(key=lambda size: order.get(_module_of(size.path, order), len(order)))
        return UpdateSizes(attachment.record.name, tuple(found), width=width)
    found.sort(key=lambda size: -1.0 if size.ratio is None else size.ratio, reverse=True)
    return UpdateSizes(attachment.record.name, tuple(found[:top]), max(0, len(found) - top), width)


def _of_site(attachment: Attachment, index: BackboneIndex, site: Site) -> UpdateSize:
    method = attachment.record.methods[site.method].name
    try:
        target = index.target(site.path)
        before = _before_merge(attachment, target)
        updates = _merged(attachment, target, before) if before else site.module.scaled_updates(site.target)
        return UpdateSize(site.path, method, *_norms(target, updates, before))
    except (TargetError, StateError) as error:
        return UpdateSize(site.path, method, why=str(error).partition(";")[0])
    except KeyError:
        # The index does not know the path.
        return UpdateSize(site.path, method, why="it is no longer in the backbone")


def _before_merge(attachment: Attachment, target: Target) -> dict[str, Tensor]:
    """The weights of a target from before the delta was merged; nothing if it is not merged there."""
    kept = attachment.record.weights_before_merge
    own = {name_of(name): weight for name, weight in kept.items() if parent_of(name) == target.owner}
    return {name: weight for name, weight in own.items() if target.parameter in ("", name)}


def _merged(attachment: Attachment, target: Target, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What merging added. The update itself cannot be computed again where it depends on the weight, which is another now."""
    now = tensors_at(attachment.backbone, attachment.record, [join(target.owner, name) for name in before])
    if any(map(is_quantized, before.values())):
        raise TargetError("merged into quantized weights")
    return {name: wide(now[join(target.owner, name)]) - wide(value) for name, value in before.items()}


def _norms(target: Target, updates: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> tuple[float, float]:
    """The norms of the updates of a target and of its own weights that they are added to.

    Raises:
        StateError: if a weight has no values in memory.
        TargetError: if a weight cannot be read.
    """
    view = weight_view(target)
    of_update, of_weight = [], []
    for name, update in updates.items():
        if name == view.name:
            # Of a feature slice only that part of the weight counts.
            own: Tensor | None = bare_weight(target.module, view) if name not in before else view.matrix(before[name])
            of_update.append(_length(view.matrix(gathered(update))))
        else:
            # Biases beside the weight: vectors over the output features.
            held = before[name] if name in before else target.module._parameters[name]
            own, changed = (_of_slice(view, tensor) for tensor in (held, update))
            of_update.append(_length(changed))
        of_weight.append(_length(own))
    return math.hypot(*of_update), math.hypot(*of_weight)


def _fully_trained(attachment: Attachment) -> Iterator[UpdateSize]:
    record = attachment.record
    for name, here in fully_trained_tensors(attachment).items():
        if not isinstance(here, nn.Parameter):
            continue
        # While the delta is not active or not attached, the backbone has its own values, and the record the trained ones.
        own, trained = record.backbone_values.get(name, here), record.trained_values.get(name, here)
        if own.is_meta or trained.is_meta or own.shape != trained.shape:
            yield UpdateSize(name, "fully trained", why="no values in memory, or it was resized")
            continue
        own, trained = gathered(own), gathered(trained).to(own.device)
        yield UpdateSize(name, "fully trained", _length(wide(trained) - wide(own)), _length(own))


def _of_slice(view: WeightView, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or view.feature_slice is None or tensor.ndim != 1:
        return tensor
    return view.feature_slice.take(gathered(tensor))


def _length(tensor: Tensor | None) -> float:
    if tensor is None:
        return 0.0
    if tensor.is_meta:
        raise StateError("its values are not in memory (meta device or offload)")
    return float(wide(gathered(tensor)).norm())


def _module_of(path: str, order: Mapping[str, int]) -> str:
    while path and path not in order:
        path = parent_of(path) if not path.endswith("]") else path.rpartition("[")[0]
    return path


def _figure(size: UpdateSize) -> str:
    """Returns the ratio in percent, and from ten on as in "x310": biases near zero may have such ratios."""
    if size.ratio is None:
        return "-"
    return f"{100 * size.ratio:.3g} %" if not 9.995 <= size.ratio < math.inf else f"x{short(size.ratio)}"


def _norm(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
