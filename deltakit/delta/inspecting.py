"""`inspect` says what a saved delta is, of any format, without a backbone and without its values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from torch import Tensor

from deltakit.core import METHODS, checked, join, label_among
from deltakit.errors import encodable, printable
from deltakit.files import (
    Access,
    Saved,
    called,
    expanded,
    expanded_each,
    find_folder,
    format_of,
    from_file,
    read_saved,
    room_for,
)
from deltakit.view import Line, report

_LEAST_ROOM = 100_000
"""So many names are read in any file: some methods, such as `Average`, have no tensors that show how many there may be."""
_NOT_OPTIONS = ("method", "targets", "at", "of", "exclude")


@dataclass(frozen=True)
class SavedMethod:
    """One method of a saved delta: its name, its options, the paths of its targets, and its number of saved values.

    If only a backbone shows the targets, as for most prefixes and prompts of other libraries, `targets` is empty.
    """

    name: str
    options: Mapping[str, Any]
    targets: Sequence[str]
    num_values: int


@dataclass(frozen=True, repr=False)
class SavedDelta:
    """What a saved delta is. `print` shows all of it.

    `name`, `base` (the Hub id of its backbone) and `base_class` are None if its files do not say them.
    """

    source: str
    """The folder, file or repository."""
    format: str
    """The library whose format it has, such as "deltakit" or "peft"."""
    name: str | None
    base: str | None
    base_class: str | None
    methods: Sequence[SavedMethod]
    fully_trained: Sequence[str]
    """The names of the backbone's own tensors that it has."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """All its tensors, without values (on the meta device), by the names of `Delta.state_dict`."""
    notes: Sequence[str] = ()
    """What `load` may do otherwise with the backbone and the values in view. Empty for deltas of deltakit."""
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What else its files hold, as plain data, such as the template and the verbalizer of a prompt model ("prompting")."""

    @property
    def num_values(self) -> int:
        """The number of values in all its tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """The size of all its tensors."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())

    def __repr__(self) -> str:
        kind = f" ({self.base_class})" if self.base_class and self.base else self.base_class or ""
        base = f", for {self.base or ''}{kind}" if self.base or kind else ""
        name = f"delta {self.name!r}" if self.name else "a delta"
        dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values())
        text = report(
            f"{name} in {self.source}, format {self.format}{base}",
            [
                Line(
                    m.name,
                    _text(m),
                    m.targets,
                    m.num_values,
                    known=bool(m.targets) or self.format == "deltakit",
                )
                for m in self.methods
            ],
            {name: self.tensors[name] for name in self.fully_trained},
            f"{self.num_values:,} values" + (f" in {' and '.join(dtypes)}, {self.num_bytes:,} bytes" if dtypes else ""),
            None,
        )
        notes = [*self.notes, *(f"it also holds {name}" for name in self.extras)]
        return encodable(text + "".join(f"\n({printable(note)})" for note in notes))


@checked
def inspect(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> SavedDelta:
    """Returns what a saved delta is: its format, its methods with their options and targets, and its size.

    It reads every format that `load` reads, needs no backbone, and loads no values.

    Args:
        source: the folder or file, or the Hub repository as "owner/name".
        revision: a branch, tag or commit of the repository.
        token: the Hub's access token; by default the one of `hf auth login`.
        cache_dir: where downloads are kept; by default the Hub's own cache.
        local_files_only: whether to read the cache alone, without asking the Hub.
        subfolder: where in the repository or folder the delta is, if not at its top: a folder such as "style", or a LoRA of
            kohya or LyCORIS as a file, such as "style.safetensors".

    Raises:
        CheckpointError: if there is no delta, or its files are damaged.
        HubError: if the repository cannot be read.
        OptionError: if `subfolder` is in no folder or repository.
    """
    access = Access(revision, token, cache_dir, local_files_only, subfolder)
    place, where = find_folder(source, access), called(source, access)
    saved = read_saved(place, None, where, values=False)
    limit = max(_LEAST_ROOM, room_for(saved.tensors))
    tensors = {**saved.tensors, **_in_order(saved)}
    with from_file(where, "train.names"):
        full = expanded(saved.train.names, saved.tensors, limit)
    with from_file(where, "methods"):
        targets = expanded_each((entry.get("targets", ()) for entry in saved.methods), (), limit)
    format = format_of(place).name
    found = [name for name in full if name in saved.tensors]
    return SavedDelta(
        where,
        format,
        saved.name,
        saved.base,
        saved.base_class,
        _methods(saved, targets, tensors),
        found,
        tensors,
        [] if format == "deltakit" else _notes(saved, found),
        {name: extra.data() for name, extra in saved.extras.items()},
    )


def _notes(saved: Saved, full: Sequence[str]) -> list[str]:
    """Returns how a delta of another library may differ once it is loaded."""
    notes = []
    if any(entry["method"] == "lora" for entry in saved.methods):
        notes.append("r is the rank in the file: loading leaves out ranks whose values are all zero")
    if _are_stacks(saved):
        notes.append("the file does not say which parameter each LoRA is on: loading finds out from the model")
    if saved.in_order:
        names = " and ".join(dict.fromkeys(saved.methods[number]["method"] for number in saved.in_order))
        notes.append(f"the file does not name the targets of {names}: loading finds them in the backbone")
    if saved.by_place:
        names = " and ".join(sorted(saved.by_place))
        notes.append(
            f"the targets of {names} are the names in the file: loading finds the modules in the backbone, and may split a "
            "method into several"
        )
    if full:
        notes.append("fully trained tensors that are equal to the backbone's are left out on loading")
    return notes


def _are_stacks(saved: Saved) -> bool:
    """Returns whether several LoRAs are on parameters of one module: PEFT's files name the module alone."""
    stacks = [
        name.rpartition(".lora")[0]
        for name, tensor in saved.tensors.items()
        if tensor.ndim == 3 and name.endswith(".A")
    ]
    owners = [path.rpartition(".")[0] for path in stacks]
    return len({*owners}) < len(owners)


def _in_order(saved: Saved) -> dict[str, Tensor]:
    """Returns the tensors of methods whose targets only a backbone shows, with their number in the place of the path."""
    names = [entry["method"] for entry in saved.methods]
    return {
        f"{label_among(names, number)}.{place}.{name}": tensor
        for number, states in saved.in_order.items()
        for place, state in enumerate(states)
        for name, tensor in state.items()
    }


def _methods(saved: Saved, targets: Sequence[Sequence[str]], tensors: Mapping[str, Tensor]) -> list[SavedMethod]:
    names = [entry["method"] for entry in saved.methods]
    owners = {join(path, label_among(names, i)): i for i, paths in enumerate(targets) for path in paths or ("",)}
    values = [0] * len(names)
    for name, tensor in tensors.items():
        # A tensor's name is `path.method.parameter`, and the parameter may have dots.
        parts = name.split(".")
        owner = next((owners[at] for end in range(len(parts)) if (at := ".".join(parts[:end])) in owners), None)
        if owner is not None:
            values[owner] += tensor.numel()
    return [
        SavedMethod(name, {key: value for key, value in entry.items() if key not in _NOT_OPTIONS}, paths, count)
        for name, entry, paths, count in zip(names, saved.methods, targets, values, strict=True)
    ]


def _text(method: SavedMethod) -> str:
    """Returns the options in words: sizes, and what is not as it is by default."""
    kind = METHODS.get(method.name)
    # Those of the example have no default.
    options = kind(**kind.example).to_dict() if kind is not None else {}
    usual = {name: value for name, value in options.items() if kind is None or name not in kind.example}
    return " ".join(
        f"{key}={value}"
        for key, value in method.options.items()
        if int in (type(value), type(usual.get(key)))
        or (value != usual.get(key) if key in usual else value not in (None, False))
    )
