"""What each format of deltas has, and how a reader names the tensors that it found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltakit.core import Attachment, join, label_among
from deltakit.files.formats.shapes import check_shapes
from deltakit.files.saved import Saved
from deltakit.files.schema import MethodEntry

Reader = Callable[[Path, nn.Module | None, bool], Saved]
"""Reads a folder or file of a format. It gets the place, the backbone or None, and whether the values are wanted.

Without a backbone it returns what the files alone say; without values, tensors on the meta device. It raises a
`CheckpointError` if a file is missing or damaged, or holds what deltakit does not have.
"""

Writer = Callable[[Path, Attachment, Mapping[str, Tensor], Mapping[str, Any], str], None]
"""Writes a delta into a folder. It gets the folder, the delta, the tensors of its state dict, its `delta_config` and its card.

It raises a `CheckpointError` if the format has no such delta, or the files cannot be written.
"""


@dataclass(frozen=True)
class Format:
    """One format of deltas."""

    name: str
    """What `Delta.save(format=)` calls it."""
    reads: str
    """What deltakit reads of it, in words."""
    files: tuple[str, ...]
    """The files that it may have. They are downloaded from any repository, so models must not have files of these names."""
    recognises: Callable[[Path], bool]
    """Whether a folder or file has this format."""
    read: Reader
    write: Writer | None = None
    late_files: tuple[str, ...] = ()
    """Files that models have, too. They are downloaded once the others show that the repository has this format."""


@dataclass
class Parts:
    """The tensors that a reader found, by method, options and target."""

    where: Path
    """The folder or file, for error messages."""
    _groups: dict[tuple[str, tuple[tuple[str, Any], ...]], dict[str, Mapping[str, Tensor]]] = field(
        default_factory=dict
    )
    _in_order: list[tuple[str, Mapping[str, Any], Sequence[Mapping[str, Tensor]]]] = field(default_factory=list)

    def add(self, method: str, options: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds the tensors of one target, by their names in the delta module. Targets with the same options are one method.

        Raises:
            CheckpointError: if they do not fit each other.
        """
        check_shapes(method, options, path, tensors, self.where)
        self._groups.setdefault((method, tuple(options.items())), {})[path] = tensors

    def add_in_order(self, method: str, options: Mapping[str, Any], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Adds the tensors of a method whose targets are not named in the file; see `Saved.in_order`.

        Raises:
            CheckpointError: if they do not fit each other.
        """
        for state in states:
            check_shapes(method, options, "", state, self.where)
        self._in_order.append((method, options, states))

    def __bool__(self) -> bool:
        return bool(self._groups or self._in_order)

    @property
    def in_order(self) -> dict[int, Sequence[Mapping[str, Tensor]]]:
        """Returns the tensors of the methods whose targets are not named, by the number of the method."""
        return {len(self._groups) + number: states for number, (_, _, states) in enumerate(self._in_order)}

    @property
    def paths(self) -> set[str]:
        """The paths of all targets."""
        return {path for by_path in self._groups.values() for path in by_path}

    def named(self) -> tuple[list[MethodEntry], dict[str, Tensor]]:
        """Returns the methods, and all tensors by their names in deltakit that have one without the backbone."""
        names = [method for method, _ in self._groups]
        methods: list[MethodEntry] = []
        tensors: dict[str, Tensor] = {}
        for number, ((method, options), by_path) in enumerate(self._groups.items()):
            methods.append({"method": method, "targets": list(by_path), **dict(options)})  # type: ignore[typeddict-item]
            label = label_among(names, number)
            for path, part in by_path.items():
                tensors |= {f"{join(path, label)}.{name}": tensor for name, tensor in part.items()}
        for method, own, _ in self._in_order:
            methods.append({"method": method, "targets": [], **own})  # type: ignore[typeddict-item]
        return methods, tensors
