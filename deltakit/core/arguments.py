"""`checked`: every public function checks its arguments by their annotations, before it does anything.

An argument that does not fit is an `OptionError`; a backbone that is no module is a `TargetError`. So are arguments that
are missing, unknown or too many. The checks cost about 5 µs a call, and nothing in forwards: no hook goes through here.
"""

import inspect
from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, TypeVar, get_type_hints

from torch import nn

from deltakit.core.annotations import Read, Unfit, reader
from deltakit.core.argument_words import advice, described, expected, members_of, shown
from deltakit.core.foreign_options import unknown_options
from deltakit.errors import DeltaError, OptionError, TargetError

T = TypeVar("T", bound=Callable[..., Any])


def checked(public: T) -> T:
    """Returns a function, or a class with all its public methods and setters, that checks its arguments.

    Signatures, docstrings and types stay as they are.
    """
    if not isinstance(public, type):
        return _guarded(public)
    for name, member in list(vars(public).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if inspect.isfunction(member):
            setattr(public, name, _guarded(member))
        elif isinstance(member, classmethod | staticmethod):
            setattr(public, name, type(member)(_guarded(member.__func__)))
        elif isinstance(member, property) and member.fset is not None:
            setattr(
                public, name, property(member.fget, _guarded(member.fset, setter=True), member.fdel, member.__doc__)
            )
    return public


def _guarded(function: Any, *, setter: bool = False) -> Any:
    door = Door(function, setter=setter)

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = door.read(args, kwargs)
        return function(*args, **kwargs)

    return guarded


def _same(value: Any) -> Any:
    return value


class Door:
    """Reads the arguments of one function or class. `setter`: the function sets a property."""

    def __init__(self, function: Any, *, setter: bool = False) -> None:
        self.function, self.setter = function, setter

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.function)

    @cached_property
    def hints(self) -> dict[str, Any]:
        """The annotations. They are looked up in the first call, because they may name classes that come later in a file."""
        try:
            return get_type_hints(self.function, include_extras=True)
        except Exception:
            # Annotations of others may name what is imported for type checkers only.
            return {}

    @cached_property
    def readers(self) -> dict[str, Read]:
        return {name: reader(self.hints[name]) for name in self.signature.parameters if name in self.hints}

    @cached_property
    def places(self) -> tuple[str, ...]:
        """The parameters that can be given without a name, in their order."""
        return tuple(p.name for p in self.signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)

    @cached_property
    def names(self) -> frozenset[str]:
        """The parameters that can be given by name; none of them if the function takes any number of arguments."""
        parameters = self.signature.parameters.values()
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return frozenset(named if len(named) == len(parameters) else ())

    @cached_property
    def required(self) -> frozenset[str]:
        return frozenset(name for name, p in self.signature.parameters.items() if p.default is p.empty)

    def _simple(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Returns whether the arguments are those of the function, one for each name: nearly always they are."""
        # `Signature.bind` tells the same, and takes most of the time of a check.
        names = (len(args), *kwargs)
        if names in self.seen:
            return True
        places = self.places
        if not self.names or len(args) > len(places) or not kwargs.keys() <= self.names:
            return False
        given = {*places[: len(args)], *kwargs}
        simple = len(given) == len(args) + len(kwargs) and given >= self.required
        if simple:
            self.seen.add(names)
        return simple

    @cached_property
    def seen(self) -> set[tuple[object, ...]]:
        """The simple calls so far: the number of arguments without a name, and the names of the others."""
        return set()

    @cached_property
    def bound(self) -> bool:
        """Whether the first argument is the object or the class that the function belongs to."""
        return next(iter(self.signature.parameters), "") in ("self", "cls")

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments, converted where their annotations ask for it.

        Raises:
            OptionError: if an argument does not fit, is missing or unknown, or there are too many.
            TargetError: if an argument must be a module and is none.
        """
        if self._simple(args, kwargs):
            readers = self.readers
            try:
                return (
                    tuple([readers.get(name, _same)(value) for name, value in zip(self.places, args, strict=False)]),
                    {name: readers.get(name, _same)(value) for name, value in kwargs.items()},
                )
            except Unfit:
                for name, value in (*zip(self.places, args, strict=False), *kwargs.items()):
                    self._one(name, value, name, args)
        try:
            found = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise self._refused(args, kwargs, error) from None
        for name, value in found.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                found.arguments[name] = tuple(self._one(name, entry, "", args) for entry in value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                found.arguments[name] = {key: self._one(name, entry, key, args) for key, entry in value.items()}
            else:
                found.arguments[name] = self._one(name, value, name, args)
        return found.args, found.kwargs

    def _one(self, name: str, value: Any, label: str, args: tuple[Any, ...]) -> Any:
        """Reads one value. `label` is the name that the caller gave it, or "" if it has none."""
        if name not in self.readers:
            return value
        try:
            return self.readers[name](value)
        except Unfit as unfit:
            found = unfit.found
        hint, where = self.hints[name], self._where(args)
        label = self.function.__name__ if self.setter else label
        where = f"{where}={shown(value)}" if self.setter else f"{where}({f'{label}={shown(value)}' if label else ''})"
        what = self._unpack(name, value) or advice(hint, label, value) or self._default(name)
        kind: type[DeltaError] = TargetError if members_of(hint) == (nn.Module,) else OptionError
        raise kind(f"{where}: expected {expected(hint)}, found {found}" + (f"; {what}" if what else ""))

    def _where(self, args: tuple[Any, ...]) -> str:
        """Returns the name under which the caller knows the function: `attach`, `Delta.save` or `LoRA`."""
        if not self.bound or not args:
            return str(self.function.__name__)
        owner = args[0] if isinstance(args[0], type) else type(args[0])
        return owner.__name__ + ("" if self.function.__name__ == "__init__" else f".{self.function.__name__}")

    def _unpack(self, name: str, value: Any) -> str:
        """What to do about a list where several arguments are expected."""
        several = self.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        if not several or not isinstance(value, list | tuple) or not value:
            return ""
        return (
            f"put a star before the list: {self.function.__name__}(..., *[...])"
            if all(self._fits(name, one) for one in value)
            else ""
        )

    def _default(self, name: str) -> str:
        default = self.signature.parameters[name].default
        if default is inspect.Parameter.empty:
            return ""
        return f"omit {name}=" + ("" if shown(default) == "..." else f" for {shown(default)}")

    def _fits(self, name: str, value: Any) -> bool:
        try:
            self.readers[name](value)
        except (Unfit, KeyError):
            return False
        return True

    def _refused(self, args: tuple[Any, ...], kwargs: dict[str, Any], error: TypeError) -> OptionError:
        """Returns the error for arguments that are unknown, too many or missing."""
        where, parameters = self._where(args), list(self.signature.parameters.values())[self.bound :]
        args = args[self.bound :]
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        unknown = [name for name in kwargs if name not in named]
        if unknown:
            return unknown_options(where, unknown, named)
        by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(args) > len(by_place):
            extra = args[len(by_place)]
            free = [name for name in named[len(by_place) :] if name not in kwargs]
            fitting = next((name for name in free if self._fits(name, extra)), None)
            what = f"write {fitting}={shown(extra)}" if fitting else f"its options are {', '.join(named) or 'none'}"
            most = f"at most {len(by_place)} values" if by_place else "no values"
            return OptionError(f"{where}: it takes {most} without a name, and {described(extra)} is one more; {what}")
        given = {*kwargs, *(p.name for p in by_place[: len(args)])}
        missing = [p for p in parameters if p.name in named and p.default is p.empty and p.name not in given]
        if missing:
            name = missing[0].name
            what = f"pass {expected(self.hints[name])}" if name in self.hints else "pass it"
            return OptionError(f"{where}: {name}= is missing; {what}")
        return OptionError(f"{where}: {error}; pass each argument once")
