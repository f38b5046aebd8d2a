"""What a delta's config looks like, and its strict reading. A downloaded config may hold anything."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any, TypedDict, get_args, get_type_hints

import msgspec

from deltakit.core import METHODS, Method
from deltakit.errors import CheckpointError, DeltaError

FORMAT_VERSION = 2

_MOST_CHARACTERS = 2**24
"""The longest config that is read. That of 10,000 targets without any pattern in their names has a tenth of this."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Sample = Annotated[list[float], msgspec.Meta(min_length=2, max_length=2)]
_Samples = Annotated[dict[str, _Sample], msgspec.Meta(max_length=4_096)]

_Plain = TypedDict("_Plain", {"class": str, "structure": str, "parameters": _Count, "values": _Samples})


class Fingerprint(_Plain, total=False):
    """The fingerprint of a backbone. The last two are those of quantized ones."""

    packed: str
    rounded: _Samples


Backbone = TypedDict("Backbone", {"id": str | None, "commit": str | None, "class": str, "fingerprint": Fingerprint})


class MethodEntry(TypedDict):
    """One method and the paths of its targets. Its options stand beside these two."""

    method: str
    targets: Annotated[list[str], msgspec.Meta(min_length=1)]


class Train(TypedDict):
    """The fully trained modules: the selectors as written, and the names of the tensors that they matched."""

    selectors: list[str]
    names: list[str]


class _DeltaConfig(TypedDict):
    format_version: int
    name: str | None
    methods: Annotated[list[MethodEntry], msgspec.Meta(min_length=1)]
    train: Train
    backbone: Backbone


class DeltaConfig(_DeltaConfig, total=False):
    """The fields that every config has, and the plain data of extras, if there are any. Others are kept, and not read."""

    extras: dict[str, dict[str, Any]]


def read_config(text: str | bytes, where: object) -> DeltaConfig:
    """Returns the config that a JSON text holds.

    Args:
        where: the file, for error messages.

    Raises:
        CheckpointError: if it is not JSON, has one key twice, has another format version, or a field is missing or of the
            wrong type.
    """
    config = read_json(text, where)
    version = config.get("format_version") if isinstance(config, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise CheckpointError(
            f"{where}: found format version {version!r}, this deltakit reads versions up to {FORMAT_VERSION}; "
            + ("upgrade deltakit" if newer else "the file is damaged: save or download it again")
        )
    checked(config, DeltaConfig, where)
    # What was read has no other fields than the known ones, and the seal is about all.
    found: DeltaConfig = config
    return found


def read_json(text: str | bytes, where: object) -> Any:
    """Returns what a JSON text holds, with finite numbers and each key once.

    Raises:
        CheckpointError: if it is damaged.
    """
    if len(text) > _MOST_CHARACTERS:
        raise CheckpointError(
            f"{where} is damaged: it has {len(text):,} characters, and a config has at most {_MOST_CHARACTERS:,}; save or "
            "download it again"
        )
    try:
        return json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError:
        why = "its brackets are nested too deeply"
    except ValueError as error:
        why = str(error)
    raise CheckpointError(f"{where} is damaged: {why}; save or download it again")


def checked(value: object, kind: Any, where: object, field: str = "") -> Any:
    """Returns a value of plain data as the type that is expected there.

    Raises:
        CheckpointError: if it has another type. The message names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        at = (field + path.strip("`").removeprefix("$")).removeprefix(".")
        place = f" at {at}" if at else ""
        raise CheckpointError(
            f"{where} is damaged{place}: {message[:1].lower()}{message[1:]}; save or download it again"
        ) from error


@contextmanager
def from_file(where: object, field: str) -> Iterator[None]:
    """Turns every error that the contents of a file cause into a `CheckpointError` that names the file and the field."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {field}: {error}") from error
    except Exception as error:
        what = str(error) if isinstance(error, DeltaError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{where}: {field}: {what}; load the backbone that the delta was trained on, or save or download the delta again"
        ) from error


def read_method(entry: Mapping[str, Any], where: object, field: str) -> Method:
    """Returns the method that an entry describes.

    Raises:
        CheckpointError: if the method or an option is unknown, or an option has a wrong type or value.
    """
    kind = METHODS.get(entry["method"])
    types = _option_types(kind) if kind is not None else {}
    options = {
        name: _option(value, types[name], where, f"{field}.{name}") if name in types else value
        for name, value in entry.items()
        if name != "targets"
    }
    with from_file(where, field):
        return Method.from_dict(options)


def _option_types(kind: type[Method]) -> dict[str, Any]:
    try:
        return _hints_of_options(kind)
    except NameError:
        # A name that exists for type checkers only. Then the method's own checks must be enough.
        return {}


@lru_cache(256)
def _hints_of_options(kind: type[Method]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    own = {field.name: hints[field.name] for field in fields(kind)}
    # As plain data these are texts; a class is written as its name.
    # What may differ between targets has one value in a file: each value is a method there, with its own targets.
    one = {name: get_args(own[name])[0] for name in kind.per_target}
    return {**own, **one, **dict.fromkeys(("at", "of", "exclude"), str | list[str] | None)}


def _option(value: object, kind: Any, where: object, field: str) -> Any:
    try:
        read = checked(value, kind, where, field)
    except TypeError:
        # An annotation that plain data cannot have, such as a union of two kinds of list.
        return value
    # 16 stays 16 where a float is expected, so that the method looks as it was written; a list becomes a tuple.
    return value if read == value else read


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {key!r} twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"expected finite numbers, found {text}")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"expected finite numbers, found {text[:40]}")
    return number


def _integer(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"expected integers of at most 18 digits, found {text[:40]}...")
    return int(text)
