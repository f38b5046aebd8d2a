"""Reads a safetensors file in one pass: its header is checked by safetensors, its tensors are views of one mapping."""

import json
from collections.abc import Collection, Mapping
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from deltakit.errors import CheckpointError

_TRIES = 100
# The types of nearly all tensors. safetensors reads the others itself.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class FileTensors(dict[str, Tensor]):
    """The tensors of a file by name. Each has a storage of its own, so that a copy or a pickle of one is not of all."""

    joined: Tensor | None = None
    """The values of all of them as one tensor; None if they are not floats of one type, or without values."""


def read_tensors(file: Path, *, values: bool = True) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file; without their values, on the meta device.

    Raises:
        CheckpointError: if it is damaged.
    """
    return read_whole(file, values)[1]


def read_metadata(file: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file.

    Raises:
        CheckpointError: if it is damaged.
    """
    return read_whole(file, False)[0]


def read_whole(file: Path, values: bool) -> tuple[dict[str, str], FileTensors, object]:
    """Returns the metadata and the tensors of a safetensors file, and the identity of the file.

    Raises:
        CheckpointError: if it is damaged.
    """
    for _ in range(_TRIES):
        before = identity(file)
        problem: Exception | None = None
        try:
            with safetensors.safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = _tensors(file, opened, values)
        except Exception as error:
            # Not only its own errors: a header with impossible sizes or types gets as far as torch.
            problem = error
        # The file is opened three times. A save may have replaced it in between.
        if before == identity(file):
            break
    if problem is not None:
        raise CheckpointError(f"{file} is damaged or cut off: {problem}; save or download it again") from problem
    return metadata, tensors, before


def identity(file: Path) -> object:
    """Returns what differs once another file has replaced this one."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _tensors(file: Path, opened: Any, values: bool) -> FileTensors:
    # `get_tensor` takes 38 us for each tensor, and these views 3 us (measured). As with it, a tensor is a view of the file
    # until its values are used, and a private one: what is written into it changes no file.
    with file.open("rb") as handle:
        mapped = mmap(handle.fileno(), 0, access=ACCESS_COPY)
    begin = 8 + int.from_bytes(mapped[:8], "little")
    header: Mapping[str, Any] = json.loads(mapped[8:begin])
    found = FileTensors()
    for name in opened.keys():  # noqa: SIM118
        entry = header[name]
        dtype = _DTYPES.get(entry["dtype"])
        start, end = (begin + offset for offset in entry["data_offsets"])
        # safetensors itself writes no value where its type must not lie.
        if dtype is None or start % dtype.itemsize:
            found[name] = opened.get_tensor(name).to("cpu" if values else "meta")
        elif values and start < end:
            count = (end - start) // dtype.itemsize
            found[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start).view(entry["shape"])
        else:
            found[name] = torch.empty(entry["shape"], dtype=dtype, device="cpu" if values else "meta")
    if values:
        found.joined = _joined(mapped, begin, {entry["dtype"] for name, entry in header.items() if name in found})
    return found


def _joined(mapped: mmap, begin: int, kinds: Collection[str]) -> Tensor | None:
    """Returns all values of a file as one tensor; None unless they are floats of one type.

    safetensors has checked that the tensors lie one behind the other and fill the file.

    Args:
        begin: where the values begin.
        kinds: the names of their types.
    """
    dtype = _DTYPES.get(next(iter(kinds))) if len(kinds) == 1 else None
    if dtype is None or not dtype.is_floating_point or begin % dtype.itemsize or begin == len(mapped):
        return None
    return torch.frombuffer(mapped, dtype=dtype, offset=begin)
