"""Reads annotations: each becomes a function that returns a value that fits, converted if needed, or says what it found.

Converted are numpy's numbers and texts, which sweeps pass and JSON cannot hold, and lists for tuples, which JSON gives back.
Nothing else is: `True` is no number, `"16"` is none either, and a text is not a list of letters.

Not beartype: it looks at one random entry of a list, so it lets `["q", ..., 5]` pass in 9 of 10 calls (measured with ten
entries), it converts nothing, and it takes 130 ms to import (a tenth of deltakit with torch).
"""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from deltakit.core.argument_words import described, is_bool, is_protocol

_INT64 = 2**63
_FLOAT32 = (2 - 2**-23) * 2.0**127

Read = Callable[[Any], Any]


class Unfit(Exception):
    """A value does not fit an annotation. `inside`: the container fits, but not what is in it."""

    def __init__(self, found: str, *, inside: bool = False) -> None:
        super().__init__(found)
        self.found, self.inside = found, inside


def reader(hint: Any) -> Read:
    """Returns the function that reads values for an annotation. It raises `Unfit` for a value that does not fit.

    Annotations that cannot be checked (type variables, protocols that are not for runtime) let every value pass.
    """
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        paths = any(_kind(member) is os.PathLike for member in of)
        return partial(_one_of, [_path if paths and member is str else reader(member) for member in of])
    if origin is Annotated:
        return reader(of[0])
    if origin is Literal:
        return partial(_literal, of)
    if origin is type:
        return partial(_class, of[0] if isinstance(of[0], type) else object)
    kind = _kind(hint)
    if kind in _PLAIN:
        return _PLAIN[kind]
    if of and kind is tuple and of[-1] is not Ellipsis:
        return partial(_fixed, [reader(member) for member in of])
    if of and kind in (Sequence, Collection, list, tuple):
        return partial(_sequence, reader(of[0]), tuple if kind is tuple else None)
    if of and kind in (Mapping, dict):
        return partial(_mapping, reader(of[0]), reader(of[1]))
    if is_protocol(kind):
        return partial(_like, kind) if getattr(kind, "_is_runtime_protocol", False) else _anything
    return partial(_instance, kind) if isinstance(kind, type) else _anything


def _kind(hint: Any) -> Any:
    return NoneType if hint is None else get_origin(hint) or hint


def _anything(value: Any) -> Any:
    return value


def _none(value: Any) -> None:
    if value is not None:
        raise Unfit(described(value))


def _bool(value: Any) -> bool:
    if not is_bool(value):
        raise Unfit(described(value))
    return bool(value)


def _int(value: Any) -> int:
    if type(value) is int and -_INT64 <= value < _INT64:
        # Nearly always, and abstract classes of numbers are asked ten times as long.
        return value
    # No size and no id is beyond what a tensor can hold.
    if isinstance(value, bool) or not isinstance(value, Integral) or not -_INT64 <= int(value) < _INT64:
        raise Unfit(described(value))
    return int(value)


def _float(value: Any) -> float:
    if type(value) is float and -_FLOAT32 <= value <= _FLOAT32:
        # Nearly always, and abstract classes of numbers are asked ten times as long.
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Unfit(described(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Unfit(described(value))
    if not -_FLOAT32 <= number <= _FLOAT32:
        # torch refuses to multiply by it.
        raise Unfit(f"{described(value)}, which float32 cannot hold")
    # An integer stays one: `alpha=16` is printed and saved as 16.
    return int(value) if isinstance(value, Integral) and abs(number) < _INT64 else number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit(described(value))
    return value if type(value) is str else str.__str__(value)


def _path(value: Any) -> Any:
    """A path, as text or as an object. An empty text is none: it would be the working directory."""
    try:
        text = os.fspath(value)
    except Exception:
        raise Unfit(described(value)) from None
    if not isinstance(text, str) or not text or "\0" in text:
        raise Unfit(described(value))
    return value


def _literal(options: Sequence[Any], value: Any) -> Any:
    for option in options:
        if type(option) is type(value) and option == value:
            return option
    raise Unfit(described(value))


def _class(base: type, value: Any) -> Any:
    if not isinstance(value, type) or not issubclass(value, base):
        raise Unfit(described(value))
    return value


def _instance(kind: type, value: Any) -> Any:
    try:
        fits = isinstance(value, kind)
    except Exception:
        # A class may say for itself what its instances are.
        fits = True
    if not fits:
        raise Unfit(described(value))
    return value


def _like(protocol: type, value: Any) -> Any:
    # A class has the methods that a protocol asks of instances.
    if isinstance(value, type):
        raise Unfit(described(value))
    return _instance(protocol, value)


def _one_of(members: Sequence[Read], value: Any) -> Any:
    errors = []
    for read in members:
        try:
            return read(value)
        except Unfit as error:
            errors.append(error)
    # The one that says more than what the value is: what is in it, or why it does not fit.
    plain = described(value)
    raise next((error for error in errors[::-1] if error.inside or error.found != plain), Unfit(plain))


def _sequence(read: Read, kind: type | None, value: Any) -> Any:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise Unfit(described(value))
    found = [_inside(read, value, entry) for entry in value]
    return (kind or (tuple if isinstance(value, tuple) else list))(found)


def _fixed(readers: Sequence[Read], value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != len(readers):
        raise Unfit(described(value))
    return tuple(_inside(read, value, entry) for read, entry in zip(readers, value, strict=True))


def _mapping(key: Read, read: Read, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise Unfit(described(value))
    found = {_inside(key, value, name, " as a key"): _inside(read, value, entry) for name, entry in value.items()}
    # The caller's own object stays what it is, unless something in it was converted.
    same = all(
        new is old for pair in zip(found.items(), value.items(), strict=True) for new, old in zip(*pair, strict=True)
    )
    return value if same else found


def _inside(read: Read, container: Any, value: Any, place: str = "") -> Any:
    try:
        return read(value)
    except Unfit as error:
        raise Unfit(f"{described(container)} with {error.found}{place}", inside=True) from None


_PLAIN: dict[Any, Read] = {
    NoneType: _none,
    bool: _bool,
    int: _int,
    float: _float,
    str: _text,
    os.PathLike: _path,
    Any: _anything,
    object: _anything,
}
