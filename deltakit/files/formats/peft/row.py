"""What a row of the table of PEFT's methods says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltakit.core import Site
from deltakit.errors import CheckpointError
from deltakit.files.formats.layers import Layers
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing

SHARED = "shared."
Options = dict[str, Any]
OptionsAt = Callable[[str, Mapping[str, Tensor]], Options]


def as_it_is(tensor: Tensor, _: object = None) -> Tensor:
    """Returns the tensor."""
    return tensor


def _nothing(_source: Source) -> OptionsAt:
    return lambda _path, _tensors: {}


def _no_options(_writing: Writing, _sites: Sequence[Site]) -> Options:
    return {}


def _no_reason(_: object) -> str:
    return ""


def _as_saved(source: Source) -> Source:
    return source


def _no_tensors(_writing: Writing, _sites: Sequence[Site]) -> dict[str, Tensor]:
    return {}


class Stored(NamedTuple):
    """One tensor of a method: its name in deltakit, and what makes it from PEFT's and back.

    A name that starts with "shared." is one of the module that all targets share; its key has no path.
    """

    ours: str
    read: Callable[[Tensor], Tensor] = as_it_is
    write: Callable[[Tensor, Site], Tensor] = as_it_is
    optional: bool = False
    """Whether some targets have none."""
    integer: bool = False
    """Whether it holds indices, and no floating-point numbers."""


class Field(NamedTuple):
    """One field of PEFT's config that is an option of deltakit's method."""

    ours: str
    kind: Any
    """Its type, as in a `TypedDict`."""
    default: Any
    """What PEFT takes where the config lacks it."""
    pattern: str = ""
    """The field that has other values by patterns of paths, such as "alpha_pattern"; "" if there is none."""
    read: Callable[[Any], Any] = as_it_is
    write: Callable[[Any], Any] = as_it_is


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method of PEFT; see `table`."""

    peft_type: str
    method: str
    """The name in deltakit."""
    tensors: Mapping[str, Stored]
    """The tensors, by what stands behind the path of the module in their keys, such as ".hada_w1_a". The key of a shared
    tensor is all that stands behind `base_model.`, such as "vera_A"."""
    fields: Mapping[str, Field]
    """The options, by PEFT's name of the field."""
    layers: Layers
    """The modules that PEFT has the method for."""
    computed: Callable[[Source], OptionsAt] = _nothing
    """Called once for a file; what it returns gives the options of a target by its path and its tensors, by deltakit's names.
    The tensors are as in the file. These options win over those of `fields`."""
    written: Callable[[Writing, Sequence[Site]], Options] = _no_options
    """Returns fields of the config that are not options. They win over those of `fields`. It may raise
    `writing.impossible(why)`."""
    refuses: Callable[[Mapping[str, Any]], str] = _no_reason
    """Returns why deltakit does not have what a config says, as in "it has {...}"; "" if it has."""
    differs: Callable[[nn.Module | None], str] = _no_reason
    """Returns why PEFT computes something else at a module, as in "{path} {...}"; "" if it does not. None is one that is not
    there."""
    prepared: Callable[[Source], Source] = _as_saved
    """Returns the file with its `consumed` tensors checked, or turned into those of `tensors`. It may raise."""
    consumed: Sequence[str] = ()
    """The ends of the names of tensors that `prepared` takes and `tensors` does not have, such as frozen matrices that
    deltakit draws from their seed."""
    drawn: Callable[[Writing, Sequence[Site]], dict[str, Tensor]] = _no_tensors
    """Returns tensors that PEFT's file has and the delta's own file does not. A name without a dot is of no module."""
    training_only: Sequence[str] = ()
    """Fields that change the training alone, such as dropouts that deltakit lacks. Whoever loads such a file is warned."""
    known: Sequence[str] = ()
    """Other fields that `computed` reads, or that do not change the outputs, such as `init_weights`."""

    @property
    def shared(self) -> dict[str, Stored]:
        """The tensors that all targets share, by their keys."""
        return {key: stored for key, stored in self.tensors.items() if stored.ours.startswith(SHARED)}

    @property
    def all_fields(self) -> set[str]:
        """The fields of the config that are not warned of."""
        patterns = {field.pattern for field in self.fields.values()} - {""}
        return {*self.fields, *patterns, *self.training_only, *self.known}


def unlike(source: Source, path: str, found: str) -> CheckpointError:
    """Returns the error for a target that has something else than the config says."""
    return CheckpointError(
        f"{source.folder}: {path} has {found}, which is not what its config says; save or download it again"
    )


def one_for_all(field: str, value: Callable[[Any], Any]) -> Callable[[Writing, Sequence[Site]], Options]:
    """Returns what writes a field of the config that all delta modules agree in."""

    def written(writing: Writing, sites: Sequence[Site]) -> Options:
        values = sorted({value(site.module) for site in sites})
        if len(values) > 1:
            raise writing.impossible(
                f"its targets have {values[0]} and {values[1]} as {field}, and PEFT has one for all"
            )
        return {field: values[0]}

    return written
