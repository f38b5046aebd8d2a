"""The handle of one delta on one backbone: attached or not, active or not, trainable or not; saved and merged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from deltakit.core import (
    DeltaModule,
    Method,
    Record,
    Selector,
    Site,
    is_first,
    is_sharded,
    key_of,
    shapes_of,
    sites_of,
    wait_for_all,
)
from deltakit.delta import merging, swapping, tensors
from deltakit.delta.claims import check_scale, claim, refuse_in_rows
from deltakit.delta.full_training import freeze_but, refresh_gradients, swap_whole
from deltakit.delta.quantized import Quantize
from deltakit.errors import StateError
from deltakit.files import check_tensors, delta_config, model_card, upload, write_folder
from deltakit.injection import put, take, watch, watch_first_forward
from deltakit.selection import Modules
from deltakit.view import described, states


class Delta:
    """One or more methods on one backbone, with all their delta modules.

    `attached`, `active` and `trainable` are independent: no call changes one through another.
    """

    def __init__(self, backbone: nn.Module, record: Record, sites: list[Site]) -> None:
        self.backbone = backbone
        self._record = record
        self._sites = sites

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def methods(self) -> tuple[Method, ...]:
        return self._record.methods

    @property
    def modules(self) -> dict[str, list[DeltaModule]]:
        """The delta modules at each target's path."""
        modules: dict[str, list[DeltaModule]] = {}
        for site in self._sites:
            modules.setdefault(site.path, []).append(site.module)
        return modules

    def modules_of(self, method: str) -> dict[str, list[DeltaModule]]:
        """The delta modules of the methods of one name, at each target's path."""
        found: dict[str, list[DeltaModule]] = {}
        for site in self._sites:
            if self.methods[site.method].name == method:
                found.setdefault(site.path, []).append(site.module)
        return found

    @property
    def trained_whole(self) -> list[str]:
        """The names of the backbone's tensors that the delta trains whole."""
        return list(self._record.whole)

    @property
    def attached(self) -> bool:
        """Whether the delta modules are in the backbone."""
        return self._sites[0].key is not None

    @property
    def active(self) -> bool:
        """Whether the delta takes part in forwards while it is attached. Can be set."""
        return self._record.active

    @active.setter
    def active(self, active: bool) -> None:
        if bool(active) != self.active:
            refuse_in_rows(self.name, self._record, "changing active")
        if self.merged and bool(active) != self.active:
            raise StateError(f"delta {self.name!r} is merged into the weights: unmerge() it before changing active")
        self._record.active = bool(active)

    @property
    def scale(self) -> float:
        """How much of its effect the delta has in forwards: 1 is all of it, 0 none. Can be set, to any finite number.

        It is a state of use, as `active` is: no file holds it, and `combine` takes deltas as they were trained.
        """
        return self._record.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        if scale != self.scale:
            check_scale(self._record, self._sites, scale)
        self._record.scale = float(scale)

    @property
    def trainable(self) -> bool:
        """Whether the delta's parameters ask for gradients. Can be set."""
        return self._record.trainable

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        self._record.trainable = bool(trainable)
        for site in self._sites:
            site.module.requires_grad_(bool(trainable))
        if self.attached:
            refresh_gradients(self.backbone, self._record.ledger)

    def freeze(self, *, train: Selector = ()) -> "Delta":
        """The delta itself; the backbone is frozen but for what `train` selects, which the delta trains and saves whole.

        Raises:
            SelectorError: if a selector picks nothing.
            StateError: if the delta is not attached, or what is to be trained is tied to what is not.
        """
        if not self.attached:
            raise StateError(f"delta {self.name!r} is not attached: attach() it before freezing its backbone")
        freeze_but(self.backbone, self._record, (train,) if isinstance(train, str) else tuple(train))
        return self

    @property
    def merged(self) -> bool:
        """Whether the delta is merged into the backbone's weights."""
        return bool(self._record.merged)

    def attach(self) -> "Delta":
        """The delta itself, put back: at each target deltas apply in the order in which they were first attached.

        Raises:
            StateError: if it is attached, or if another delta took its name meanwhile.
        """
        record = self._record
        if self.attached:
            raise StateError(f"delta {self.name!r} is attached already; detach() it before attaching it again")
        claim(self.backbone, record, self._sites)
        for site in self._sites:
            if site.module.record is not record:
                site.module.record = record
            if site.module.shapes is None:
                site.module.shapes = shapes_of(site.module)
            put(self.backbone, site.target, key_of(record, site.method, site.module.place), site.module)
        swap_whole(self.backbone, record)
        self._settle()
        return self

    def detach(self) -> "Delta":
        """The delta itself, taken off: the backbone is bit for bit as it was. A detached delta is left as it is."""
        if not self.attached:
            return self
        refuse_in_rows(self.name, self._record)
        if self.merged:
            self.unmerge()
        swap_whole(self.backbone, self._record)
        for site in self._sites:
            take(self.backbone, site.target, str(site.key))
        self._settle()
        return self

    def _settle(self) -> None:
        refresh_gradients(self.backbone, self._record.ledger)
        watch(self.backbone)
        watch_first_forward(self.backbone, self._record, attached=self.attached)

    @contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """The bare backbone for the time of a `with` block; the delta is as before afterwards, whatever happens."""
        was = self.attached
        merged = merging.merged_weights(self.backbone, self._record)
        self.detach()
        try:
            yield self.backbone
        finally:
            if was and not self.attached:
                self.attach()
                merging.put_back(self.backbone, self._record, merged)

    def merge(self, *, quantize: Quantize | None = None) -> "Delta":
        """The delta itself, added to the backbone's weights: no cost in forwards. Saving stays as before.

        Args:
            quantize: how to make a quantised weight again, where there are such. It is given an `nn.Linear` with the sum, and
                quantises it in place or returns another layer. What the rounding loses of the update is said in a warning.

        Raises:
            StateError: if it is not attached and active, if a weight is tied, or another delta is merged into it.
            TargetError: if one of its methods is no change of weights, or a weight is quantised and `quantize` is not given.
        """
        refuse_in_rows(self.name, self._record, "merge")
        if not (self.attached and self.active) or self.merged:
            now = states(self._record, attached=self.attached)
            raise StateError(f"delta {self.name!r}: merging expects it attached, active and not merged; it is {now}")
        merging.merge(self.backbone, self._record, self._sites, quantize)
        return self

    def unmerge(self) -> "Delta":
        """The delta itself, out of the weights again: they are bit for bit as they were.

        Raises:
            StateError: if it is not merged.
        """
        if not self.merged:
            raise StateError(f"delta {self.name!r} is not merged: it is {states(self._record, attached=self.attached)}")
        merging.unmerge(self.backbone, self._record)
        return self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything the delta trains, by the names of its file: its modules' parameters and what it trains whole."""
        return tensors.named_parameters(self.backbone, self._record, self._sites)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything the delta trains: what an optimiser takes."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        """How many numbers the delta trains, those of modules trained whole among them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The delta's tensors as its file holds them: path, method and parameter name; never the delta's name.

        Raises:
            StateError: if this process has only a part of the delta (FSDP1, DeepSpeed ZeRO-3).
        """
        return tensors.state_dict(self.backbone, self._record, self._sites)

    def load_state_dict(self, state: Mapping[str, Tensor], *, where: str = "the state dict") -> None:
        """Takes over all tensors of a `state_dict()`.

        Raises:
            CheckpointError: if a name is missing or left over, or a shape differs; nothing is changed then.
            StateError: if the delta is merged into the weights.
        """
        if self.merged:
            raise StateError(f"delta {self.name!r} is merged into the weights: unmerge() it before loading others")
        check_tensors(state, self.state_dict(), where=where)
        tensors.load_state_dict(self.backbone, self._record, self._sites, state)

    def swap(self, other: "Delta") -> "Delta":
        """The delta itself, now with the values of another of the same methods, places and shapes, which has its own instead.

        The fastest way to another task, and free of recompilation: no tensor is copied, and nothing of the modules changes.
        The other delta may wait (`load(..., attach=False)`). The names stay.

        Raises:
            StateError: if the two differ, or one is merged, in a `rows` block, or trains parts of the backbone whole.
        """
        swapping.swap((self._record, self._sites), (other._record, other._sites))
        return self

    def save(self, folder: str | PathLike[str]) -> Path:
        """The folder, which now holds the delta: its config, its tensors and a model card (a few hundred KB).

        Where the delta is spread over processes (FSDP2), every process must call it; the first one writes.

        Raises:
            StateError: if its scale is not 1, or this process has only a part of it (FSDP1, DeepSpeed ZeRO-3) or, where it was
                offloaded, none.
        """
        if self.scale != 1:
            raise StateError(
                f"delta {self.name!r} has the scale {self.scale:g}, which no file holds: set scale = 1 to save it as it was "
                f"trained, or, of LoRA and BitFit, save combine(model, {{{self.name!r}: {self.scale:g}}}).delta"
            )
        path = Path(folder)
        config = delta_config(self.backbone, self._record, self._sites, self.num_parameters)
        sharded = any(map(is_sharded, self.parameters()))
        state = self.state_dict()
        tensors.refuse_absent(state)
        if not sharded or is_first():
            write_folder(path, config, state, model_card(config))
        if sharded:
            wait_for_all()
        return path

    def push(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, message: str | None = None
    ) -> str:
        """The URL of the Hub repository to which the delta was uploaded, created if it is not there.

        Raises:
            HubError: if the Hub cannot be reached or refuses.
        """
        with TemporaryDirectory() as folder:
            return upload(self.save(folder), repo_id, private=private, token=token, commit_message=message)

    def __repr__(self) -> str:
        names = Modules(self.backbone).names
        return described(
            self.backbone, self._record, self._sites, attached=self.attached, trained=self.num_parameters, names=names
        )


def deltas(backbone: nn.Module) -> list[Delta]:
    """The deltas attached to a backbone, in their order: in a deepcopy or an unpickled model, the copies."""
    return [Delta(backbone, record, sites) for record, sites in sites_of(backbone).values()]
