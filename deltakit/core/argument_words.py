"""What is said about an argument that does not fit: what was expected, what was found, and what to write instead."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Number
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from torch import Tensor, nn

_LENGTH = 60

_WORDS: dict[Any, tuple[str, str]] = {
    NoneType: ("None", "None"),
    bool: ("True or False", "True or False"),
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    str: ("a text", "texts"),
    os.PathLike: ("a path", "paths"),
    Tensor: ("a tensor", "tensors"),
    nn.Module: ("a torch.nn.Module", "modules"),
    Callable: ("a function", "functions"),
}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "")


def expected(hint: Any, *, several: bool = False) -> str:
    """Returns what an annotation asks for, in words.

    >>> expected(str | Sequence[str] | None)
    'a text, a list of texts or None'
    >>> expected(Sequence[int | None])
    'a list of whole numbers or None'
    """
    # None comes last: it is what a reader least looks for.
    words = dict.fromkeys(_one(member, several) for member in members_of(hint))
    *first, last = sorted(words, key=lambda one: one == "None")
    return f"{', '.join(first)} or {last}" if first else last


def _one(hint: Any, several: bool) -> str:
    origin, of = get_origin(hint), get_args(hint)
    kind = NoneType if hint is None else origin or hint
    if kind in _WORDS:
        return _WORDS[kind][several]
    if origin is Annotated:
        return expected(of[0], several=several)
    if origin is Literal:
        *first, last = map(repr, of)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is type:
        return f"{'classes' if several else 'a class'} of {getattr(of[0], '__name__', 'any kind')}"
    entry = next((member for member in reversed(of) if member is not Ellipsis), Any)
    inside = "" if entry is Any else f" of {expected(entry, several=True)}"
    if kind in (Sequence, Collection, list, tuple):
        return f"{'lists' if several else 'a list'}{inside}"
    if kind in (Mapping, dict):
        return f"{'dictionaries' if several else 'a dictionary'}{inside}"
    return getattr(kind, "_in_words", "") or _with_article(getattr(kind, "__name__", str(kind)))


def members_of(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the annotation itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def described(value: Any) -> str:
    """Returns what a value is, in words.

    >>> described("16"), described(nn.Linear), described(Tensor([[2, 3]])), described([])
    ("the text '16'", 'the class Linear', 'a tensor of shape [1, 2]', 'an empty list')
    """
    if value is None or is_bool(value):
        return str(value)
    if isinstance(value, str):
        return f"the text {shown(value)}" if value else "an empty text"
    if isinstance(value, bytes):
        return f"the bytes {shown(value)}"
    if isinstance(value, Number):
        return f"the number {shown(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, list | tuple | dict | set):
        kind = "dictionary" if type(value) is dict else type(value).__name__
        return _with_article(kind) if len(value) else f"an empty {kind}"
    return "a function" if type(value).__name__ == "function" else _with_article(type(value).__name__)


def is_protocol(kind: Any) -> bool:
    """Returns whether a type is a protocol, which says what its instances have and not what they are."""
    return bool(getattr(kind, "_is_protocol", False))


def is_bool(value: Any) -> bool:
    """Returns whether a value is True or False, also as numpy writes them."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def shown(value: Any) -> str:
    """Returns a short value as code, and dots for a long one."""
    if not (value is None or isinstance(value, str | bytes | Number | type) or is_bool(value)):
        return "..."
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= _LENGTH else f"{value[:_LENGTH]!r}..."
    if isinstance(value, int) and value.bit_length() > 200:
        # Python refuses to write integers of thousands of digits.
        return f"{'-' if value < 0 else ''}2**{value.bit_length()}"
    # numpy's own repr is np.float64(0.5).
    return repr(value) if type(value).__module__ == "builtins" else str(value)


def advice(hint: Any, name: str, value: Any) -> str:
    """Returns what to write instead of a value that does not fit; "" if there is nothing better to say than what is expected.

    Args:
        name: the argument's name, or "" if it has none.
    """
    kinds = [NoneType if member is None else get_origin(member) or member for member in members_of(hint)]
    option = f"{name}=" if name else ""
    if bool in kinds and isinstance(value, str | int) and str(value).lower() in _TRUE + _FALSE:
        return f"write {option}{str(value).lower() in _TRUE}"
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        one, many = {bool, int, float} & {*kinds}, {Sequence, list, tuple} & {*kinds}
        return "write .item() behind it" if one and value.ndim == 0 else "write .tolist() behind it" if many else ""
    if {int, float} & {*kinds}:
        found = _number(value)
        if found is not None and (float in kinds or isinstance(found, int)):
            return f"write {option}{found}"
    if Sequence in kinds:
        if isinstance(value, str) and value:
            return f"write {option}[{shown(value)}]"
        if isinstance(value, Iterable) and not isinstance(value, Sequence | Mapping | bytes | type):
            return "put list(...) around it"
    if os.PathLike in kinds and isinstance(value, str):
        return "write '.' for the working directory" if not value else "leave out its zero bytes"
    return next(filter(None, (_of_class(kind, value) for kind in kinds)), "")


def _of_class(kind: Any, value: Any) -> str:
    if not isinstance(kind, type):
        return ""
    # A protocol that has attributes cannot be asked for its subclasses.
    if isinstance(value, type) and not is_protocol(kind) and issubclass(value, kind):
        return f"write {value.__name__}() with parentheses"
    if kind is nn.Module:
        return _of_module(value)
    own: Any = getattr(kind, "_advice_for", None)
    return own(value) if own is not None else ""


def _of_module(value: Any) -> str:
    if isinstance(value, str):
        return f"load the model first, such as by transformers' AutoModel.from_pretrained({shown(value)})"
    if isinstance(value, list | tuple) and value and all(isinstance(entry, nn.Module) for entry in value):
        return "put the modules into one with torch.nn.ModuleList"
    for name in ("backbone", "backbone_model", "model"):
        try:
            held = getattr(value, name, None)
        except Exception:
            # An attribute of somebody else's class, which may raise anything.
            continue
        if isinstance(held, nn.Module):
            return f"pass its .{name}"
    return "pass the model itself"


def _number(value: Any) -> int | float | None:
    """The number that somebody meant who wrote it as a text, or as a float without decimals."""
    try:
        number = float(value) if isinstance(value, str | float) else None
    except ValueError:
        return None
    # What is beyond 64 bits would not fit either; nor do infinities, and what is not a number.
    if number is None or not abs(number) < 2**63:
        return None
    return int(number) if number.is_integer() else number


def _with_article(word: str) -> str:
    return f"{'an' if word[:1].lower() in tuple('aeiou') else 'a'} {word}"
