"""DeltaContents: the part of a delta's handle that only reads, such as its modules and parameters."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from deltakit.core import Attachment, DeltaModule, Method, checked, notebook_bundle, records_of
from deltakit.delta import tensors
from deltakit.delta.changed_backbone import gone_modules
from deltakit.delta.full_training import fully_trained_tensors, tensors_at
from deltakit.delta.running_statistics import held_of
from deltakit.delta.update_sizes import UpdateSizes, update_sizes
from deltakit.errors import OptionError, encodable
from deltakit.selection import BackboneIndex
from deltakit.view import check_width, described

_INSTEAD = {
    "attached": "; call attach() or detach()",
    "merged": "; call merge() or unmerge()",
    "name": "; give the name when attaching: attach(model, ..., name=)",
}


@checked
class DeltaContents:
    """The modules, parameters and state of one delta on one backbone."""

    _in_words: ClassVar[str] = "a delta such as attach and load return"
    """How error messages name what is expected where a delta is."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._record = attachment.record

    def __setattr__(self, name: str, value: object) -> None:
        """Sets a property. A name that is none is an error: `delta.activ = False` would do nothing.

        Raises:
            OptionError: if there is no such property, or it cannot be set.
        """
        known = getattr(type(self), name, None)
        if not name.startswith("_") and (not isinstance(known, property) or known.fset is None):
            settable = [n for n in dir(type(self)) if getattr(getattr(type(self), n), "fset", None) is not None]
            what = "cannot be set" if known is not None else "does not exist"
            raise OptionError(f"delta.{name} {what}; {', '.join(settable)} can be set" + _INSTEAD.get(name, ""))
        super().__setattr__(name, value)

    @property
    def backbone(self) -> nn.Module:
        """The model that the delta belongs to."""
        return self._attachment.backbone

    @property
    def name(self) -> str:
        """The delta's name among those on its backbone."""
        return self._record.name

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that the delta was made of, with their options."""
        return self._record.methods

    @property
    def modules(self) -> dict[str, list[DeltaModule]]:
        """The delta modules by the path of their target."""
        return self.modules_of(None)

    def modules_of(self, method: str | None) -> dict[str, list[DeltaModule]]:
        """Returns the delta modules of the methods with this name (None for all), by the path of their target.

        Raises:
            OptionError: if the delta has no method with this name.
        """
        names = list(dict.fromkeys(own.name for own in self.methods))
        if method is not None and method not in names:
            raise OptionError(
                f"modules_of({method!r}): delta {self.name!r} has no such method; its methods are {', '.join(names)}"
            )
        found: dict[str, list[DeltaModule]] = {}
        for site in self._attachment.sites:
            if method in (None, self.methods[site.method].name):
                found.setdefault(site.path, []).append(site.module)
        return found

    @property
    def fully_trained(self) -> list[str]:
        """The names of the backbone's tensors that the delta trains fully and saves, and of running statistics that moved."""
        return held_of(self._attachment)

    @property
    def attached(self) -> bool:
        """Whether the delta modules are in the backbone."""
        return self._attachment.attached

    @property
    def merged(self) -> bool:
        """Whether the delta is merged into the backbone's weights."""
        return self._record.merged

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields all trained parameters, those of fully trained modules too, by their names in the delta's file."""
        return tensors.named_parameters(self._attachment)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields all trained parameters, for an optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    def parameter_groups(self, **by_tag: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns all trained parameters as groups for an optimiser: `delta.parameter_groups(up={"lr": 1e-3})` (LoRA+).

        Args:
            by_tag: the optimiser's options for each tag. LoRA has the tags "down" (A) and "up" (B); the modules of `train=`
                have "fully_trained".

        Raises:
            OptionError: if no parameter has one of the tags.
        """
        return tensors.parameter_groups(self._attachment, by_tag)

    @property
    def num_parameters(self) -> int:
        """The number of trained values, including those of fully trained modules."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the delta's tensors by their names in its file: `path.method.parameter`, without the delta's name.

        Under FSDP2 every process must call it, because it gathers the tensors.

        Raises:
            StateError: if this process has only a part of the delta (FSDP1, DeepSpeed ZeRO-3).
        """
        held_of(self._attachment)
        return tensors.state_dict(self._attachment)

    def show(self, *, top: int | None = None, width: int | None = None) -> UpdateSizes:
        """Returns how much the delta has changed each weight, as a table with bars: ||update|| / ||weight|| (Frobenius norms).

        The update has the current `scale`, and the weight is the backbone's own. Methods that do not change weights, such as
        adapters and prefixes, have no such figure. Each update is computed in full size, one after the other.

        Args:
            top: how many targets to list, those with the largest ratios first; by default all, in the order of the model.
            width: the most cells of a line in text. Where lines are longer, the bars are left out, and then the starts of
                long names; figures never. By default lines are as long as they need to be.

        Raises:
            OptionError: if `top` or `width` is below 1.
        """
        if top is not None and top < 1:
            raise OptionError(f"show(top={top}): expected at least 1; omit it for all targets")
        check_width("show", width)
        held_of(self._attachment)
        return update_sizes(self._attachment, top, width)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_bundle(repr(self))

    def __repr__(self) -> str:
        held_of(self._attachment)
        backbone, own = self.backbone, fully_trained_tensors(self._attachment)
        # Each once: a tied parameter has several names.
        first = {id(tensor): name for name, tensor in reversed(own.items()) if isinstance(tensor, nn.Parameter)}
        text = described(
            self._attachment,
            trained=self.num_parameters,
            names=BackboneIndex(backbone).names,
            full={name: tensor for name, tensor in own.items() if first.get(id(tensor)) == name},
            gone=gone_modules(self._attachment),
            saved={
                id(tensor)
                for other in records_of(backbone)
                for tensor in tensors_at(backbone, other, other.fully_trained).values()
            },
        )
        return encodable(text)
